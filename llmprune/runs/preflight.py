"""What a run will need, by formula, before it starts: memory, room on the disk, and time at this machine's speed.

Counted: the weights of a block, the statistics of a stage, what the solvers hold, hidden states, and the products of
matrices, which are most of the time wherever blocks are wide. Left out: attention's own products beyond its projections,
reading and writing. Times come out right to about a factor of two; the run's table says what it really took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from llmprune.base.folders import check_room
from llmprune.base.hardware import operations_per_second
from llmprune.base.words import count, size
from llmprune.cost.matrices import Matrix, matrices
from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.recipes import SCANNING, Recipe
from llmprune.measure.perplexity import LOGITS
from llmprune.models.experts import experts_per_token
from llmprune.models.sites import Block
from llmprune.numerics.stats import SAMPLE_TOKENS, Gram
from llmprune.output.resume import partial_folder
from llmprune.solvers import METHODS
from llmprune.steps.base import Load, Step, Work
from llmprune.steps.weights.scanning import as_tried
from llmprune.stream.activations import KEPT

# memory, in tensors of the size that is named
_SOLVER = 6  # a weight in float32: what the hungriest solver holds at once
_FACTORS = 4  # a Gram: its factor, its unit form, an inverse, a product
_FIT = 5  # a block in float32: weights, gradients, two moments, the best state
_FORWARD = 6  # the widest activation of a batch
_SAVED = 2  # the outputs of all matrices of a block, for a backward pass
_ERRORS = 3  # the outputs of the sample that errors are measured on
_LOGITS = 3 * 4  # bytes a logit: as made, in float32, its logarithm
_FILES = 1.02  # of the checkpoint: headers, tokenizer, record

# time, in products
_STAGES = 2  # of the tokens with a block's weights, a stream, at most
_BACKWARD = 3  # of a step of the fit, in forwards
_REFIT = 20  # of a weight with its Gram; a method says its own
_INVERSES = 6  # of a Gram's size, a matrix
_EFFICIENCY = 0.6  # of a plain product's speed: what blocks 1024 wide reached on a CPU of two cores


@dataclass(frozen=True, slots=True)
class Needs:
    """Of each process.

    Attributes:
        start: bytes that the process holds already.
        activations: bytes of the hidden states of all texts, in the pruned model and, where needed, in the dense one, and of
            what is kept of the calibration tokens in the middle of a block.
        weights: bytes of the largest block, as read and as written, with its copy where the dense model runs beside, or what
            embeddings and head, which are there before anything is solved, take beyond `solving`; and what a forward makes.
        solving: bytes of a stage's statistics and samples, or of a block's where it is solved in one pass, of what a solver
            holds, and of what is gathered from all blocks.
        output: bytes of the output folder, and of what a search keeps beside it.
        forward: floating-point operations of running the blocks and the head, in the compute dtype.
        statistics: those of Grams, which are summed in float32 of products in the compute dtype.
        solve: those of solvers, in float32.
    """

    start: int
    activations: int
    weights: int
    solving: int
    output: int
    forward: float
    statistics: float
    solve: float

    def seconds(self, device: torch.device, dtype: torch.dtype) -> float:
        """At the speed that products run at on `device` now."""
        own, full = (operations_per_second(device, kind) for kind in (dtype, torch.float32))
        return (self.forward / own + self.statistics / max(own, full) + self.solve / full) / _EFFICIENCY


def estimate(
    model: PretrainedConfig,
    blocks: Sequence[Block],
    texts: Texts,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    batch: int,
    checkpoint: int,
    load: Load,
    processes: int = 1,
    scanning: Recipe = SCANNING,
    all_experts: bool = False,
    pinned: bool = False,
) -> Needs:
    """What a step needs that works on `blocks`, which may be on the meta device, for a job of `recipe`; `checkpoint` is the
    bytes of its tensors; probed tokens go through half of the blocks on average; a scan of the dense model, which comes before,
    measures errors by `scanning`; `all_experts`: each sees every token; `pinned`: hidden states rest in pinned memory, as those
    of a GPU do.
    """
    recipe, probed, scanned = load.recipe or recipe, load.probed, load.scanned
    config, (_, length) = model.get_text_config(), texts.calibration.ids.shape
    streams = 2 if recipe.target == "corrected" or recipe.reconstruct else 1
    tokens = texts.calibration.tokens() / processes
    evaluated = texts.evaluation.ids.numel() / processes if texts.evaluation and load.evaluates else 0
    sizes = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    chosen = None if all_experts else experts_per_token(model)
    by_block = [matrices(block.sites, chosen) for block in blocks]
    every = [matrix for own in by_block for matrix in own]
    held = max((one.columns for one in every if one.columns <= KEPT * config.hidden_size), default=0) * recipe.true_sequential
    head = config.vocab_size * config.hidden_size
    widest = max((max(one.rows, one.columns) for one in every), default=config.hidden_size)
    logits = _LOGITS * min(length * config.vocab_size, LOGITS) if evaluated else 0
    made = max(_FORWARD * batch * length * widest * dtype.itemsize, logits)
    inside = max(sizes) * (dtype.itemsize * (1 + streams) + 4 * _FIT * recipe.reconstruct)
    if recipe.reconstruct:
        made += int(4 * _SAVED * batch * length * max(sum(one.rows * one.share for one in own) for own in by_block))
    passes = (_STAGES * streams + (scanned > 0)) * tokens + 2 * evaluated + probed / processes / 2
    passes += _BACKWARD * recipe.passes * tokens * recipe.reconstruct
    hidden, inside_block = (_resting(width * dtype.itemsize, batch * length, pinned) for width in (config.hidden_size, held))
    solving = max(_statistics(block, own, recipe) for block, own in zip(blocks, by_block, strict=True))
    solving += max((_solving(one, recipe) for one in every), default=0)
    return Needs(
        start=psutil.Process().memory_info().rss,
        activations=int((streams * tokens + 2 * evaluated + probed / processes) * hidden + streams * tokens * inside_block),
        weights=max(2 * head * dtype.itemsize - solving, inside) + made,
        solving=solving + load.gathered,
        output=int(_FILES * checkpoint) + load.kept,
        forward=2 * (passes * sum(one.rows * one.columns * one.share for one in every) + 2 * evaluated * head),
        statistics=sum(_counting(one, recipe, tokens) + _counting(one, scanning, tokens) * (scanned > 0) for one in every),
        solve=load.operations + sum(_work(one, recipe, processes) + scanned * _work(one, scanning, processes) for one in every),
    )


def _resting(each: int, tokens: int, pinned: bool) -> float:
    """Bytes that a token takes which makes `each`, in batches of `tokens`: torch rounds pinned memory up to a power of two."""
    nbytes = each * tokens
    return 2 ** (nbytes - 1).bit_length() / tokens if pinned and nbytes else each


def _statistics(block: Block, own: Sequence[Matrix], recipe: Recipe) -> int:
    """Bytes of the statistics that are alive at once: a stage's, or those of a block that is solved in one pass."""
    by_stage = {(site.pool or site.name): one for site, one in zip(block.sites, own, strict=True)}
    each = [_kept(one, recipe) for one in by_stage.values()]
    return max(each, default=0) if recipe.true_sequential else sum(each)


def _kept(matrix: Matrix, recipe: Recipe) -> int:
    """Bytes of what is kept of a matrix's inputs, of all experts' where it is one's."""
    grams = matrix.experts + (recipe.target == "corrected") if _wants_gram(recipe) else 0
    sample = SAMPLE_TOKENS * matrix.share * matrix.experts
    return int(4 * matrix.columns * (grams * matrix.columns + sample))


def _solving(matrix: Matrix, recipe: Recipe) -> int:
    """Bytes of what solving a matrix and measuring its error take."""
    factors = _FACTORS * matrix.columns**2 if _wants_gram(recipe) else 0
    outputs = _ERRORS * SAMPLE_TOKENS * matrix.share
    return int(4 * (factors + matrix.rows * (_SOLVER * matrix.columns + outputs)))


def _counting(matrix: Matrix, recipe: Recipe, tokens: float) -> float:
    """Operations of a matrix's statistics."""
    grams = (2 if recipe.target == "corrected" else 1) * _wants_gram(recipe)
    return 2 * matrix.columns**2 * tokens * matrix.share * grams


def _work(matrix: Matrix, recipe: Recipe, processes: int) -> float:
    """Operations of solving a matrix."""
    if not _wants_gram(recipe):
        return 0
    products = METHODS.get(recipe.method).products + _REFIT * recipe.refit
    return 2 * matrix.columns**2 * (products * matrix.rows / processes + _INVERSES * matrix.columns)


def _wants_gram(recipe: Recipe) -> bool:
    return METHODS.get(recipe.method).statistic is Gram or recipe.refit or recipe.target == "corrected"


def shortage(needs: Needs, device: torch.device, *, mapped: bool, here: int = 1) -> str | None:
    """Which memory will be too small, if any, and what helps; `here` processes share this machine's."""
    free, wanted = psutil.virtual_memory().available, 0 if mapped else needs.activations
    inside = needs.weights + needs.solving
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0]
        if inside > on_device:
            return f"that is more than the {size(on_device)} free on {device}: a smaller --batch-size or --seqlen may help"
    else:
        wanted += inside
    if wanted * here > free:
        disk = "" if mapped else "--activations disk, "
        return f"that is more than the {size(free)} of memory free here: {disk}fewer --samples or a smaller --batch-size help"
    return None


def describe(needs: Needs, seconds: float, *, mapped: bool) -> str:
    """In one line."""
    memory = needs.start + needs.weights + needs.solving + (0 if mapped else needs.activations)
    disk = needs.output + (needs.activations if mapped else 0)
    took = (
        f"{max(seconds, 1):.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
    where = " on disk" if mapped else ""
    return (
        f"about {size(memory)} of memory (start-up {size(needs.start)}, activations {size(needs.activations)}{where}, weights "
        f"{size(needs.weights)}, solving {size(needs.solving)}), {size(disk)} of disk, {took} from here, without reading and "
        "writing files"
    )


def predict(
    job: Job,
    work: Work,
    config: PretrainedConfig,
    blocks: Sequence[Block],
    texts: Texts,
    output: Path,
    step: Step,
) -> dict[str, Any]:
    """What the run will need, by formula, for the record.

    Raises:
        InputError: the disk has too little room for it.
    """
    mapped = job.config.activations == "disk"
    load = step.load(texts)
    needs = estimate(
        config,
        blocks,
        texts,
        job.recipe,
        dtype=work.dtype,
        batch=job.batch(texts.calibration.ids.shape[1], work.device),
        checkpoint=work.nbytes,
        processes=job.ranks.size,
        load=load,
        scanning=as_tried(job.recipe),
        all_experts=job.config.all_experts,
        pinned=work.device.type == "cuda" and not mapped,
    )
    kept = sum(path.stat().st_size for path in partial_folder(output).glob("*.safetensors"))  # by an earlier run
    check_room(output, needs.output - kept + (needs.activations * job.ranks.size if mapped else 0))
    seconds = needs.seconds(work.device, work.dtype)
    text = describe(needs, seconds, mapped=mapped)
    text += f", and a search of at most {count(load.minutes, 'minute')}" if load.minutes else ""
    short = shortage(needs, work.device, mapped=mapped, here=job.ranks.here)
    return asdict(needs) | {"seconds": seconds, "text": text} | ({"short": short} if short else {})
