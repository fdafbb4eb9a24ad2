"""What a run will need, by formula, before it starts: memory, room on the disk, and time at this machine's speed.

Counted: the weights of a block, the statistics of a stage, what the solvers hold, hidden states, and the products of
matrices, which are most of the time wherever blocks are wide. Left out: attention's own products beyond its projections,
reading and writing. Times come out right to about a factor of two; the run's table says what it really took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from llmprune import solvers
from llmprune.hardware import operations_per_second
from llmprune.models.sites import Block, Site
from llmprune.recipes import Recipe
from llmprune.reconstruct import PASSES
from llmprune.stats import Gram
from llmprune.texts import Texts
from llmprune.words import size

# memory, in tensors of the size that is named
_SOLVER = 6  # a weight in float32: what the hungriest solver holds at once
_FACTORS = 4  # a Gram: its factor, its unit form, an inverse, a product
_FIT = 5  # a block in float32: weights, gradients, two moments, the best state
_FORWARD = 6  # the widest activation of a batch
_FILES = 1.02  # of the checkpoint: headers, tokenizer, record

# time, in products
_STAGES = 2  # of the tokens with a block's weights, a stream: a stage's forward ends where the stage is reached
_BACKWARD = 3  # of a step of the fit, in forwards
_SWEEPS = {"magnitude": 0, "wanda": 0, "ria": 0, "dsnot": 0, "sparsegpt": 1}  # of a weight with its Gram; other methods:
_ALTERNATIONS = 30
_REFIT = 20
_INVERSES = 6  # of a Gram's size, a matrix
_CHOSEN = 2  # experts that a token is sent to
_EFFICIENCY = 0.6  # of a plain product's speed: what blocks 1024 wide reached on a CPU of two cores


@dataclass(frozen=True, slots=True)
class Needs:
    """Of each process. Memory is beyond what a process holds that has only imported llmprune.

    Attributes:
        activations: bytes of the hidden states of all texts, in the pruned model and, where needed, in the dense one.
        weights: bytes of the largest block, as read and as written, with its copy where the dense model runs beside, or of
            embeddings and head; and what a forward makes.
        solving: bytes of a stage's statistics, and of what a solver holds.
        output: bytes of the output folder.
        forward: floating-point operations of running the blocks and the head, in the compute dtype.
        solve: those of statistics and solvers, in float32.
    """

    activations: int
    weights: int
    solving: int
    output: int
    forward: float
    solve: float

    def seconds(self, device: torch.device, dtype: torch.dtype) -> float:
        """At the speed that products run at on `device` now."""
        forward, solve = (operations_per_second(device, kind) for kind in (dtype, torch.float32))
        return (self.forward / forward + self.solve / solve) / _EFFICIENCY


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix (rows, columns) and, where it is an expert's, how many experts there are."""

    rows: int
    columns: int
    experts: int = 1

    @property
    def share(self) -> float:
        """Of the tokens that reach it."""
        return min(_CHOSEN / self.experts, 1)

    def held(self, recipe: Recipe) -> int:
        """Bytes of its stage's statistics, a Gram an expert, and of what solving it takes."""
        grams = self.experts + _FACTORS + (recipe.target == "corrected") if _wants_gram(recipe) else 0
        return 4 * (grams * self.columns**2 + _SOLVER * self.rows * self.columns)

    def work(self, recipe: Recipe, tokens: float, processes: int) -> float:
        """Operations of its statistics and of solving it."""
        if not _wants_gram(recipe):
            return 0
        products = _SWEEPS.get(recipe.method, _ALTERNATIONS) + _REFIT * recipe.refit
        seen = tokens * self.share * (2 if recipe.target == "corrected" else 1)
        return 2 * self.columns**2 * (seen + products * self.rows / processes + _INVERSES * self.columns)


def estimate(
    model: PretrainedConfig,
    blocks: Sequence[Block],
    texts: Texts,
    recipe: Recipe,
    *,
    dtype: torch.dtype,
    batch: int,
    checkpoint: int,
    processes: int = 1,
    probed: int = 0,
) -> Needs:
    """What pruning needs. `blocks` may be on the meta device; `checkpoint` is the bytes of its tensors; `probed` are tokens
    whose hidden states are followed besides, through half of the blocks on average.
    """
    config, (_, length) = model.get_text_config(), texts.calibration.ids.shape
    streams = 2 if recipe.target == "corrected" or recipe.reconstruct else 1
    tokens = texts.calibration.tokens() / processes
    evaluated = texts.evaluation.ids.numel() / processes if texts.evaluation else 0
    sizes = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    matrices = [matrix for block in blocks for matrix in _matrices(block.sites)]
    head = config.vocab_size * config.hidden_size
    widest = max((max(one.rows, one.columns) for one in matrices), default=config.hidden_size)
    made = max(_FORWARD * batch * length * widest * dtype.itemsize, 3 * length * config.vocab_size * 4 if evaluated else 0)
    inside = max(sizes) * (dtype.itemsize * (1 + streams) + 4 * _FIT * recipe.reconstruct)
    passes = (
        _STAGES * streams * tokens + 2 * evaluated + probed / processes / 2 + _BACKWARD * PASSES * tokens * recipe.reconstruct
    )
    return Needs(
        activations=int((streams * tokens + 2 * evaluated + probed / processes) * config.hidden_size * dtype.itemsize),
        weights=max(2 * head * dtype.itemsize, inside) + made,
        solving=max((one.held(recipe) for one in matrices), default=0),
        output=int(_FILES * checkpoint),
        forward=2 * (passes * active(blocks) + 2 * evaluated * head),
        solve=sum(one.work(recipe, tokens, processes) for one in matrices),
    )


def active(blocks: Sequence[Block]) -> float:
    """Weights of matrices that a token meets: of experts, those of the ones it is sent to."""
    return sum(one.rows * one.columns * one.share for block in blocks for one in _matrices(block.sites))


def _matrices(sites: Sequence[Site]) -> list[_Matrix]:
    experts: dict[str, set[object]] = {}
    for site in sites:
        if site.pool:
            experts.setdefault(site.pool, set()).add(site.part[0])
    return [_Matrix(site.rows, site.columns, len(experts[site.pool]) if site.pool else 1) for site in sites]


def _wants_gram(recipe: Recipe) -> bool:
    return solvers.load(recipe.method).statistic is Gram or recipe.refit or recipe.target == "corrected"


def shortage(needs: Needs, device: torch.device, *, mapped: bool) -> str | None:
    """Which memory will be too small, if any, and what helps."""
    free, wanted = psutil.virtual_memory().available, 0 if mapped else needs.activations
    inside = needs.weights + needs.solving
    if device.type == "cuda":
        on_device = torch.cuda.mem_get_info(device)[0]
        if inside > on_device:
            return f"that is more than the {size(on_device)} free on {device}: a smaller --batch-size or --seqlen may help"
    else:
        wanted += inside
    if wanted > free:
        disk = "" if mapped else "--activations disk, "
        return f"that is more than the {size(free)} of memory free here: {disk}fewer --samples or a smaller --batch-size help"
    return None


def describe(needs: Needs, seconds: float, *, mapped: bool) -> str:
    """In one line."""
    memory = needs.weights + needs.solving + (0 if mapped else needs.activations)
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
        f"about {size(memory)} of memory (activations {size(needs.activations)}{where}, weights {size(needs.weights)}, "
        f"solving {size(needs.solving)}), {size(disk)} of disk, {took}"
    )
