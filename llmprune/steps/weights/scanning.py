"""A scan of the dense model, block by block: each matrix's error curve, and what pruning it alone costs the model.

The curves come from one pass over the calibration text and one Gram an input. For the cost each matrix is pruned by itself, to
one pattern, and some windows are followed from there to the end of the model, where the KL divergence from the dense model is
measured (as Sieberling et al., "EvoPress", 2025, measure it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.data.windows import Texts, Windows
from llmprune.job.job import Job
from llmprune.job.recipes import SCANNING, Recipe
from llmprune.job.record import RunRecord
from llmprune.job.scan import Scan, Scanned
from llmprune.measure.divergence import streamed_divergences
from llmprune.models.experts import observable
from llmprune.models.sites import Block, Site, Stage
from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Gram, InputSample
from llmprune.solvers import METHODS
from llmprune.steps.base import Nowhere, Work
from llmprune.steps.weights.batching import make_batches
from llmprune.steps.weights.library import Library, group_name
from llmprune.steps.weights.observing import Observed, blend_experts, passes, traced
from llmprune.steps.weights.sharing import make_rounds, solve
from llmprune.stream.activations import Activations
from llmprune.stream.engine import stream

PROBED = 2048  # calibration tokens that are followed to the end of the model
_OUTLYING = 5  # times a block's mean: what counts as an outlier, as OWL has it
Keep = Callable[[Mapping[str, Any]], None]


@dataclass(slots=True)
class _Seen:
    """What is added up of the matrices of one name."""

    sites: list[Site]
    lost: dict[str, float] = field(default_factory=dict)
    whole: float = 0.0
    outliers: float = 0.0

    def errors(self) -> dict[str, float]:
        return {pattern: lost / self.whole if self.whole > 0 else 0.0 for pattern, lost in self.lost.items()}


@dataclass(slots=True)
class Scanner:
    """Scans the model of `work`.

    Attributes:
        sites: names of those that are to be scanned.
        grid: the patterns that errors are measured at.
        probe: what matrices are pruned to by themselves.
        library: keeps the matrices solved at those, where that is asked for.
        probes: whether to measure what pruning each matrix alone costs the model; else that counts as nothing.
    """

    job: Job
    work: Work
    texts: Texts
    sites: frozenset[str]
    grid: Sequence[Pattern]
    probe: Pattern
    library: Library | None = None
    probes: bool = True
    _measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _going: list[Activations] = field(default_factory=list)

    def scan(self, record: RunRecord, known: Mapping[str, Any], keep: Keep) -> Scan:
        """One pass over the model, which is as before when it ends.

        Args:
            record: says which model and text these are.
            known: what an earlier, unfinished scan has measured, by block; `keep` hears all that has been, after each block.
        """
        job, work = self.job, self.work
        windows = self.texts.calibration.first(PROBED, job.ranks.size)
        feed, few = self._record(self.texts.calibration), self._record(windows)
        job.progress.start(len(work.blocks), 0)

        def visit(block: Block) -> None:
            for going in self._going:
                with job.clock("probe"):
                    going.advance(block)
            self._scan(block, feed, few, known.get(str(block.index)))
            keep({**known, **self._measured})

        with observable(work.model, all_tokens=job.config.all_experts):
            stream(work.source, _Feeds(job, feed, few, len(work.blocks) - 1), Nowhere(), visit)
        blocks, ranks = list(work.blocks.values()), job.ranks
        share = windows.share(ranks.rank, ranks.size)
        with work.outside(), job.clock("probe"):
            nats = streamed_divergences(work.model, blocks, few, self._going, share, work.device, ranks)
        every = [one for measured in self._measured.values() for one in measured]
        matrices = [
            Scanned(**one, nats=own) for one, own in zip(every, nats if self.probes else [0.0] * len(every), strict=True)
        ]
        return Scan(
            model=record.model,
            calibration=record.calibration,
            compute=record.compute,
            method=as_tried(job.recipe).method,
            probe=str(self.probe),
            probed=windows.tokens(),
            matrices=matrices,
            seconds=dict(job.clock.seconds),
        )

    def _record(self, windows: Windows) -> Activations:
        work, ranks = self.work, self.job.ranks
        with work.outside(), self.job.clock("capture"):
            return work.record(windows.share(ranks.rank, ranks.size), self.job.batch(windows.ids.shape[1], work.device))

    def _scan(self, block: Block, feed: Activations, few: Activations, known: list[dict[str, Any]] | None) -> None:
        """Measure the block's curves, unless an earlier scan has, and send its probes on their way."""
        found = dict[str, _Seen]()
        grid = [*dict.fromkeys([*(() if known else self.grid), self.probe])]
        scores = dict[str, Tensor]()
        for group in passes(self._stages(block, feed)):
            with self.job.clock("forward"):
                observed = feed.collect(block, group, self._observe)
            for seen in observed:
                with self.job.clock("statistics"):
                    seen.add_up(self.job.ranks)
            blend_experts(group, observed)
            for stage, seen in zip(group, observed, strict=True):
                assert isinstance(seen.statistic, Gram)
                scores |= {site.name: seen.statistic.rms() for site in stage}
            probed: dict[str, list[tuple[Site, Tensor]]] = {}
            for pattern in grid:
                solved = self._solve(group, observed, pattern, found)
                probed = solved if pattern == self.probe else probed
                if self.library and not known and pattern in self.grid:
                    for name, weights in solved.items():
                        self.library.put(name, pattern, weights)
            if self.probes:
                self._probe(block, probed, few)
        _count_outliers(found, scores)
        measured = known or [_measured(name, block, one) for name, one in found.items()]
        self._measured[str(block.index)] = measured
        self.job.progress.scanned([Scanned(**one, nats=0.0) for one in measured], str(self.probe))

    def _stages(self, block: Block, feed: Activations) -> list[Stage]:
        with self.job.clock("forward"):
            every, _ = traced(feed, block, self.job.ranks)
        stages: list[Stage] = [[site for site in stage if site.name in self.sites] for stage in every]
        return [stage for stage in stages if stage]

    def _observe(self, stage: Stage, device: torch.device) -> Observed:
        return Observed(Gram(stage[0].columns, device), InputSample(self.texts.calibration.tokens()), None, self.job.clock)

    def _solve(
        self, group: Sequence[Stage], observed: Sequence[Observed], pattern: Pattern, found: dict[str, _Seen]
    ) -> dict[str, list[tuple[Site, Tensor]]]:
        """Prune all matrices of `group` to `pattern`, where they can be, and add up what that loses; returns their weights."""
        recipe = as_tried(self.job.recipe)
        sites = [site for stage in group for site in stage if not pattern.misfit(site.rows, site.columns)]
        fitting = [[site for site in stage if site in sites] for stage in group]
        pairs = [(stage, seen) for stage, seen in zip(fitting, observed, strict=True) if stage]
        batches = make_batches(
            [stage for stage, _ in pairs],
            [seen for _, seen in pairs],
            dict.fromkeys((site.name for site in sites), pattern),
            recipe.method,
        )
        solved: dict[str, list[tuple[Site, Tensor]]] = {}
        with self.job.clock("solve"):
            for work in make_rounds(batches, recipe.method, self.job.ranks.size):
                dense = {batch: batch.dense() for batch in dict.fromkeys(share.batch for share in work)}
                for batch, solution in solve(work, dense, recipe, self.job.ranks).items():
                    for site, seen, w, own in batch.by_site(dense[batch], solution):
                        assert isinstance(seen.statistic, Gram)
                        lost, whole = seen.statistic.errors(w, own.weight)
                        one = found.setdefault(group_name(site), _Seen([]))
                        if site not in one.sites:
                            one.sites.append(site)
                            one.whole += whole
                        one.lost[str(pattern)] = one.lost.get(str(pattern), 0.0) + lost
                        solved.setdefault(group_name(site), []).append((site, own.weight))
        return solved

    def _probe(self, block: Block, solved: Mapping[str, list[tuple[Site, Tensor]]], few: Activations) -> None:
        """Send the probe windows on their way from the block with each of its matrices pruned by itself."""
        for weights in solved.values():
            probe = few.fork()
            with self.job.clock("probe"), replaced(weights):
                probe.advance(block)
            self._going.append(probe)


@dataclass(frozen=True, slots=True)
class _Feeds:
    """A `Feed` that advances the calibration stream and the probes' dense one."""

    job: Job
    feed: Activations
    few: Activations
    last: int

    def advance(self, block: Block) -> None:
        with self.job.clock("forward"):
            if block.index < self.last:
                self.feed.advance(block)
        with self.job.clock("probe"):
            self.few.advance(block)
        self.job.progress.block(block.index)


def as_tried(recipe: Recipe) -> Recipe:
    """What comes nearest to `recipe` where matrices are solved in the dense model, each at several levels, from one pass."""
    if METHODS.get(recipe.method).statistic is not Gram:
        return SCANNING
    return replace(recipe, target="dense", reconstruct=False, true_sequential=False)


@contextmanager
def replaced(weights: Sequence[tuple[Site, Tensor]]) -> Iterator[None]:
    """The sites with other weights for a while."""
    own = [site.weight.clone() for site, _ in weights]
    try:
        for site, weight in weights:
            site.write(weight)
        yield
    finally:
        for (site, _), weight in zip(weights, own, strict=True):
            site.weight.copy_(weight)


def _count_outliers(found: Mapping[str, _Seen], rms: Mapping[str, Tensor]) -> None:
    """Fill in each matrix's share of outliers."""
    sums = [(float(score.sum(dtype=torch.float64)), score.numel()) for score in _scores(found, rms)]
    mean = sum(total for total, _ in sums) / max(sum(size for _, size in sums), 1)
    for one in found.values():
        above = sum(int((site.weight.abs() * rms[site.name] > _OUTLYING * mean).sum()) for site in one.sites)
        one.outliers = above / sum(site.weight.numel() for site in one.sites)


def _scores(found: Mapping[str, _Seen], rms: Mapping[str, Tensor]) -> Iterator[Tensor]:
    return (site.weight.abs().float() * rms[site.name] for one in found.values() for site in one.sites)


def _measured(name: str, block: Block, one: _Seen) -> dict[str, Any]:
    """All of a `Scanned` but the nats."""
    site = one.sites[0]
    return {
        "name": name,
        "block": block.index,
        "kind": name.rpartition(".")[2],
        "sites": len(one.sites),
        "rows": site.rows,
        "columns": site.columns,
        "errors": one.errors(),
        "outliers": one.outliers,
    }


def followed(sites: Iterable[str], texts: Texts, processes: int) -> int:
    """Tokens that a scan of `sites` follows to the end of the model: the dense ones and, from each matrix on, its probe's."""
    kinds = {re.sub(r"\.experts\.\d+\.", ".experts.*.", name) for name in sites}
    return (2 + len(kinds)) * texts.calibration.first(PROBED, processes).ids.numel()
