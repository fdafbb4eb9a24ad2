"""One run over a model: stream its blocks, prune each, evaluate along the way, and fill in the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune import solvers
from llmprune.asked import output_folder
from llmprune.clock import Clock
from llmprune.config import PruneConfig
from llmprune.data import Given, Windows
from llmprune.errors import InputError
from llmprune.evaluate.perplexity import streamed_perplexity
from llmprune.models.experts import observable
from llmprune.models.names import Names
from llmprune.models.sites import Block
from llmprune.patterns import Pattern, parse
from llmprune.plan import Plan
from llmprune.pruner import Pruner
from llmprune.ranks import Ranks
from llmprune.recipes import Recipe, choose_recipe
from llmprune.reconstruct import check_batches
from llmprune.report.console import Progress
from llmprune.report.record import RunRecord
from llmprune.stream.activations import Activations
from llmprune.stream.engine import Sink, Source, stream
from llmprune.stream.resume import Manifest
from llmprune.stream.shards import ShardWriter
from llmprune.structured import scores
from llmprune.texts import Texts
from llmprune.words import count


@dataclass(slots=True)
class Job:
    """What was asked. Method and pattern are looked up at once, so that a mistake costs no work."""

    config: PruneConfig
    given: Given | None
    progress: Progress
    ranks: Ranks
    clock: Clock = field(default_factory=Clock)
    recipe: Recipe = field(init=False)
    pattern: Pattern | None = field(init=False)

    def __post_init__(self) -> None:
        recipe, asked = choose_recipe(self.config), self.config.true_sequential
        published = solvers.load(recipe.method).true_sequential
        self.recipe = replace(recipe, true_sequential=published if asked is None else asked)
        self.pattern = parse(self.config.sparsity) if self.config.sparsity is not None else None
        scores.load(self.config.score)

    def method(self) -> str:
        """In words."""
        config, steps = self.config, []
        if config.layers is not None:
            steps.append(f"layers by {config.layer_score}")
        if config.target_params is not None:
            steps.append("a budget of parameters by second order")
        if config.heads is not None or config.neurons is not None or config.target_params is not None:
            fitted = "" if config.refit is False else f" + least squares, {self.recipe.target} target"
            steps.append(f"{config.score}{fitted}{', by layer' if config.per_layer else ''}")
        return ", then ".join(steps + ([str(self.recipe)] if self.pattern else []))

    def output(self, model: str) -> Path | None:
        """See `output_folder`."""
        return output_folder(self.config, model)


@dataclass(frozen=True, slots=True)
class Work:
    """The model that a job works on, on disk or in memory alike.

    Attributes:
        outside: makes what is outside the blocks (embeddings, head) available for a while.
        names: where on disk the model's tensors are; nothing for a model in memory.
        scratch: a folder whose disk is to hold the hidden states; None: memory holds them.
    """

    model: PreTrainedModel
    blocks: Mapping[str, nn.Module]
    device: torch.device
    dtype: torch.dtype
    parameters: int
    nbytes: int
    source: Source
    plan: Plan
    outside: Callable[[], AbstractContextManager[None]] = nullcontext
    names: Names = field(default_factory=dict)
    scratch: Path | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """What came of the blocks that an earlier run finished, where they are, and where to commit those that come."""

    finished: Sequence[Mapping[str, Any]]
    writer: ShardWriter
    manifest: Manifest | None

    def has(self, block: Block) -> bool:
        return block.index < len(self.finished)


def run(
    job: Job, work: Work, texts: Texts, sink: Sink, record: RunRecord, edited: set[str], resume: Resume | None = None
) -> None:
    """Stream the model block by block, and fill in what was found; `edited` learns what was changed."""
    clock, ranks, blocks = job.clock, job.ranks, list(work.blocks.values())
    batch = max(job.config.batch_size // ranks.size, 1)

    def record_activations(windows: Windows) -> Activations:
        return Activations.record(work.model, blocks, windows, batch=batch, device=work.device, folder=work.scratch)

    evaluation = texts.evaluation.share(ranks.rank, ranks.size) if texts.evaluation else None
    with work.outside(), clock("capture"):
        feed = record_activations(texts.calibration.share(ranks.rank, ranks.size))
        dense = record_activations(evaluation) if evaluation else None
    pruned = dense.fork() if dense else None
    if job.recipe.reconstruct:
        check_batches(feed, ranks)
    pruner = Pruner(
        work.plan.patterns,
        job.recipe,
        feed,
        feed.fork() if job.recipe.reconstruct or job.recipe.target == "corrected" else None,
        texts.calibration.tokens(),
        len(blocks) - 1,
        job.progress,
        clock,
        ranks,
        work.names,
        edited,
    )

    def visit(block: Block) -> None:
        if dense is not None:
            with clock("evaluate"):
                dense.advance(block)
        if resume and resume.has(block):
            pruner.repeat(block, resume.finished[block.index], resume.writer.restore)
        else:
            pruner.prune(block)

    job.progress.start(len(blocks), len(work.plan.patterns))
    with observable(work.model, all_tokens=job.config.all_experts):
        stream(
            work.source, _Feeds(feed, pruned, len(blocks) - 1, job.progress, clock), _Keeper(sink, clock, pruner, resume), visit
        )
    if thin := [site for site in pruner.records if site.notes.get("pool_share", 0) > 0.5]:
        least = min(thin, key=lambda site: site.tokens)
        job.progress.note(
            f"with fewer tokens than inputs ({least.name}: {least.tokens}), {count(len(thin), 'expert matrix')} must lean on "
            "all experts' statistics; more --samples or --all-experts give each its own"
        )
    if not pruner.records:
        raise InputError("nothing was pruned: the model's forward runs none of the chosen sites")
    if evaluation and dense and pruned:
        with work.outside(), clock("evaluate"):
            record.dense = streamed_perplexity(work.model, blocks, dense, evaluation, work.device, ranks)
            record.pruned = streamed_perplexity(work.model, blocks, pruned, evaluation, work.device, ranks)
    record.sites, record.reconstructions = pruner.records, pruner.reconstructions
    record.skipped |= dict.fromkeys(pruner.uncalled, "the model's forward never runs it")
    record.size["nonzero_before"], record.size["nonzero_after"] = pruner.nonzero
    record.peak_memory = job.clock.peaks()


@dataclass(frozen=True, slots=True)
class _Feeds:
    """Advances the calibration stream, up to the inputs of the `last` block, and the pruned evaluation stream, if any."""

    calibration: Activations
    evaluation: Activations | None
    last: int
    progress: Progress
    clock: Clock

    def advance(self, block: Block) -> None:
        if block.index < self.last:
            with self.clock("forward"):
                self.calibration.advance(block)
        if self.evaluation is not None:
            with self.clock("evaluate"):
                self.evaluation.advance(block)
        self.progress.block(block.index)


@dataclass(frozen=True, slots=True)
class _Keeper:
    """Keeps each block, unless an earlier run did, and commits what came of it."""

    sink: Sink
    clock: Clock
    pruner: Pruner
    resume: Resume | None

    def put(self, block: Block) -> None:
        if self.resume and self.resume.has(block):
            return
        with self.clock("write"):
            self.sink.put(block)
            if self.resume and self.resume.manifest:
                report = self.pruner.report(block) | {"seconds": self.clock.seconds}
                self.resume.manifest.commit(self.resume.writer.shard(block), report)
