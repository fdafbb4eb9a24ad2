"""The step that prunes weights: stream the model's blocks, prune each, evaluate along the way, and fill in the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmprune.base.words import count
from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.progress import Progress
from llmprune.job.record import RunRecord, SiteRecord
from llmprune.models.extras import copy_extras
from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton
from llmprune.numerics.patterns import Pattern
from llmprune.output.resume import Manifest
from llmprune.output.shards import ShardWriter
from llmprune.steps.base import Load, Resume, Step, Work
from llmprune.steps.fitting import check_batches
from llmprune.steps.weights.allocate.base import grid
from llmprune.steps.weights.budget import WeightBudget
from llmprune.steps.weights.library import library_bytes
from llmprune.steps.weights.scanning import followed
from llmprune.steps.weights.searching import searches
from llmprune.steps.weights.selection import EVERY, Selection, select
from llmprune.steps.weights.spreading import UNIFORM, spread
from llmprune.steps.weights.streaming import stream_through
from llmprune.steps.weights.visitor import WeightPruner
from llmprune.stream.activations import Activations


class PruneWeights(Step):
    """A `Step`: prune weights to the job's pattern. Goes on from the last block that an earlier run finished."""

    title = "pattern"

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        self._job, self._skeleton, self._work = job, skeleton, Work.on_disk(skeleton, scratch)
        self._selection = choose(job, skeleton.describe())
        self._budget = WeightBudget(job, skeleton, self._selection) if job.config.by == "weights" else None
        self.skipped: Mapping[str, str] = self._selection.skipped

    def __str__(self) -> str:
        return str(self._budget) if self._budget else self._selection.describe(asked(self._job))

    def load(self, texts: Texts) -> Load:
        job, patterns, shapes = self._job, self._selection.patterns, self._selection.shapes
        if not self._scans():
            return Load()
        levels, searched = self._levels(), job.pattern is not None and searches(job)
        weights = sum(shapes[name][0] * shapes[name][1] for name in patterns)
        return Load(
            probed=followed(patterns, texts, job.ranks.size),
            scanned=len(self._budget.grid() if self._budget else levels),
            minutes=job.config.search_minutes if searched else 0,
            kept=library_bytes(weights, levels, self._work.dtype) if searched else 0,
        )

    def _levels(self) -> list[Pattern]:
        """What a matrix may be pruned to where the job's pattern is spread."""
        job = self._job
        return grid(job.pattern, searched=searches(job)) if job.pattern is not None else []

    def _scans(self) -> bool:
        """Whether the dense model is scanned first."""
        spreads = self._budget is not None or self._job.config.allocate != UNIFORM
        return spreads and (self._job.scan is None or searches(self._job))

    def run(self, texts: Texts, record: RunRecord, into: Path, manifest: Manifest | None) -> None:
        job, edited = self._job, set[str]()
        writer = ShardWriter(self._skeleton, into, edited)
        resume = Resume.of(job, manifest, writer)
        if manifest:
            copy_extras(self._skeleton.checkpoint.folder, into)
        selection = spread(job, self._work, self._selection, texts, record, manifest, self._budget)
        prune_weights(job, self._work, selection, texts, record, edited, resume)
        if manifest:
            with job.clock("write"):
                writer.finish()


def choose(job: Job, blocks: Sequence[Block]) -> Selection:
    """The sites that `job` asks for, each with the pattern of all or the one that the user's file has for it, or any
    where a budget decides."""
    wanted = job.allocation if job.allocation is not None else job.pattern
    return select(blocks, EVERY if wanted is None else wanted, only=job.config.only, skip=job.config.skip)


def asked(job: Job) -> str:
    """The sparsity in words, such as `60%`, `60% spread by sensitivity` or `the patterns of mine.json`."""
    if job.allocation is not None:
        return f"the patterns of {job.config.allocation}"
    return f"{job.pattern}" + (f" spread by {job.config.allocate}" if job.config.allocate != UNIFORM else "")


def prune_weights(
    job: Job,
    work: Work,
    selection: Selection,
    texts: Texts,
    record: RunRecord,
    edited: set[str],
    resume: Resume | None = None,
) -> None:
    """Stream the model block by block, and fill in what was found; `edited` learns what was changed."""

    def make(feed: Activations) -> WeightPruner:
        if job.recipe.reconstruct:
            check_batches(feed, job.ranks)
        return WeightPruner(
            selection.patterns,
            job.recipe,
            feed,
            feed.fork() if job.recipe.reconstruct or job.recipe.target == "corrected" else None,
            texts.calibration.tokens(),
            len(work.blocks) - 1,
            job.progress,
            job.clock,
            job.ranks,
            work.names,
            edited,
        )

    pruner = stream_through(job, work, texts, record, make, len(selection.patterns), resume)
    _note_thin_experts(pruner.records, job.progress)
    record.sites, record.reconstructions = pruner.records, pruner.reconstructions
    record.size["nonzero_before"], record.size["nonzero_after"] = pruner.nonzero


def _note_thin_experts(records: Sequence[SiteRecord], progress: Progress) -> None:
    if thin := [site for site in records if site.notes.get("pool_share", 0) > 0.5]:
        least = min(thin, key=lambda site: site.tokens)
        progress.note(
            f"with fewer tokens than inputs ({least.name}: {least.tokens}), {count(len(thin), 'expert matrix')} must lean on "
            "all experts' statistics; more --samples or --all-experts give each its own"
        )
