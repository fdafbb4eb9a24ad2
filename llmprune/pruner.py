"""The visitor that prunes weights: collect what a stage's inputs say, solve its matrices, write them back, record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.errors import InputError
from llmprune.models.sites import Block, Site
from llmprune.patterns import Pattern, verify
from llmprune.report.console import Progress
from llmprune.report.record import Clock, SiteRecord
from llmprune.solvers.base import Solver
from llmprune.stats import InputSample, Statistic
from llmprune.stream.activations import Activations, Stage

_ERROR_TOKENS = 2048  # calibration tokens that output errors are measured on


@dataclass(frozen=True, slots=True)
class Observed:
    """What is kept of a stage's inputs: the solver's statistic, and a sample to measure errors on."""

    statistic: Statistic
    sample: InputSample

    def add(self, x: Tensor) -> None:
        self.statistic.add(x)
        self.sample.add(x)


@dataclass(slots=True)
class Pruner:
    """Prunes one block after the other.

    Attributes:
        patterns: site name -> pattern; other sites are left alone.
        tokens: calibration tokens in `feed`.
        true_sequential: solve each stage on inputs that the stages before it, already pruned, put out.
        names: a weight's name in the model -> its name on disk, where the two differ.
        records: one a pruned matrix, in the order solved.
        uncalled: sites that the model's forward never runs.
        nonzero: weights that are not zero in the matrices pruned so far, before and after.
    """

    patterns: Mapping[str, Pattern]
    solver: Solver
    feed: Activations
    tokens: int
    true_sequential: bool
    progress: Progress
    clock: Clock
    names: Mapping[str, str]
    records: list[SiteRecord] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    nonzero: tuple[int, int] = (0, 0)

    def prune(self, block: Block) -> None:
        """Solve the block's planned sites, stage by stage or all from one pass.

        Raises:
            InputError: inputs or weights are not finite, or the solver cannot work with them; the site is named.
        """
        with self.clock("collect"):
            traced = self.feed.stages(block)
        called = {site.name for stage in traced for site in stage}
        self.uncalled += [site.name for site in block.sites if site.name not in called]
        planned = ([site for site in stage if site.name in self.patterns] for stage in traced)
        stages = [stage for stage in planned if stage]
        for group in [[stage] for stage in stages] if self.true_sequential else [stages]:
            with self.clock("collect"):
                observed = self.feed.collect(block, group, self._observe)
            for stage, seen in zip(group, observed, strict=True):
                self._solve_stage(block, stage, seen)

    def _observe(self, columns: int, device: torch.device) -> Observed:
        return Observed(self.solver.statistic(columns, device), InputSample(self.tokens // _ERROR_TOKENS))

    def _solve_stage(self, block: Block, stage: Stage, seen: Observed) -> None:
        if not seen.statistic.finite():
            names = ", ".join(site.name for site in stage)
            raise InputError(f"the inputs of {names} hold NaN or infinity; try --dtype float32")
        for site in stage:
            self.progress.solving(site.name)
            with self.clock("solve"):
                record = self._solve(block, site, seen)
            self.records.append(record)
            self.progress.site(record)

    def _solve(self, block: Block, site: Site, seen: Observed) -> SiteRecord:
        start = time.perf_counter()
        pattern, dense = self.patterns[site.name], site.weight.to(torch.float32, copy=True)
        if not bool(torch.isfinite(dense).all()):
            raise InputError(f"the weights of {site.name} hold NaN or infinity")
        try:
            solution = self.solver.solve(dense, seen.statistic, pattern)
        except InputError as error:
            raise InputError(f"{site.name}: {error}; another calibration text may help") from None
        site.write(solution.weight)
        after = site.weight.float()
        if not bool(torch.isfinite(after).all()):
            raise InputError(f"{site.name}: the pruned weights overflow {site.storage}; try --method wanda")
        verify(after, pattern)
        left = int((after != 0).sum())
        self.nonzero = (self.nonzero[0] + int((dense != 0).sum()), self.nonzero[1] + left)
        weight = f"{site.name}.weight"
        return SiteRecord(
            name=site.name,
            tensor=self.names.get(weight, weight),
            block=block.index,
            pattern=str(pattern),
            shape=(after.shape[0], after.shape[1]),
            transposed=site.transposed,
            sparsity=1 - left / after.numel(),
            error=seen.sample.relative_error(dense, after),
            tokens=seen.statistic.tokens,
            seconds=time.perf_counter() - start,
            notes=dict(solution.notes),
        )
