"""What a method is given at once, and what it finds: a stage's small matrices as one, experts' matrices in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune import solvers
from llmprune.errors import InputError
from llmprune.linalg import masked_least_squares
from llmprune.models.sites import Site, Stage
from llmprune.patterns import Pattern, Stacked
from llmprune.recipes import Recipe
from llmprune.report.record import Clock
from llmprune.solvers.base import Solution
from llmprune.stats import Cross, Gram, InputSample, Statistic, lean_on_pool

_STACK = 4  # rows a column up to which a stage is solved as one matrix: beyond, only memory would grow
# weights and Grams of experts that are solved at once: on a CPU as many as stay in its cache, beyond which it gets slower
_BATCH_BYTES = {"cpu": 2**22, "cuda": 2**28}
BLEND = 0.5  # how far the corrected target goes from the dense weights


@dataclass(frozen=True, slots=True)
class Observed:
    """What is kept of a stage's inputs: the solver's statistic, a sample to measure errors on, and the dense inputs'
    product with them where the target is corrected."""

    statistic: Statistic
    sample: InputSample
    cross: Cross | None
    clock: Clock

    def add(self, x: Tensor, dense: Tensor | None) -> None:
        with self.clock("statistics"):
            self.statistic.add(x)
            self.sample.add(x)
            if self.cross is not None:
                if dense is None or dense.shape != x.shape:
                    raise InputError("the dense and the pruned model send it different tokens; use --target dense")
                self.cross.add(x, dense)

    def aim(self, w: Tensor) -> Tensor:
        """The weights to imitate on the pruned model's inputs."""
        if self.cross is None:
            return w
        assert isinstance(self.statistic, Gram)
        return self.cross.aim(w, self.statistic, BLEND)


@dataclass(frozen=True, slots=True)
class Batch:
    """Matrices of one shape and pattern, to be solved at once.

    Attributes:
        stacks: of each matrix the sites that it is made of, one below the other.
        seen: what each matrix is fed.
        pattern: that of every site.
    """

    stacks: list[list[Site]]
    seen: list[Observed]
    pattern: Pattern

    def sites(self) -> list[Site]:
        return [site for stack in self.stacks for site in stack]

    def rows(self) -> list[int]:
        """Of each site of a stack."""
        return [site.rows for site in self.stacks[0]]

    def most(self) -> int:
        """How many matrices are best solved at once."""
        columns, device = self.stacks[0][0].columns, self.stacks[0][0].weight.device.type
        return max(_BATCH_BYTES.get(device, 0) // (4 * columns * (columns + sum(self.rows()))), 1)

    def parts(self) -> list[Batch]:
        """The same in batches of at most `most` matrices."""
        starts = range(0, len(self.stacks), self.most())
        return [Batch(self.stacks[i : i + self.most()], self.seen[i : i + self.most()], self.pattern) for i in starts]


def make_batches(
    group: Sequence[Stage], observed: Sequence[Observed], patterns: Mapping[str, Pattern], method: str
) -> list[Batch]:
    """Put together what `method` can solve at once."""
    solver = solvers.load(method)
    alike: dict[object, Batch] = {}
    for stage, seen in zip(group, observed, strict=True):
        for stack in _stacks(stage, patterns, stackable=solver.stackable):
            first = stack[0]
            shape = (first.pool, tuple(site.rows for site in stack), patterns[first.name])
            key = shape if first.pool and solver.batched else first.name
            batch = alike.setdefault(key, Batch([], [], patterns[first.name]))
            batch.stacks.append(stack)
            batch.seen.append(seen)
    return [part for batch in alike.values() for part in batch.parts()]


def _stacks(stage: Stage, patterns: Mapping[str, Pattern], *, stackable: bool) -> list[list[Site]]:
    """The stage's sites, those that are solved as one matrix together."""
    small = sum(site.rows for site in stage) <= _STACK * stage[0].columns
    if stackable and small and len({patterns[site.name] for site in stage}) == 1:
        return [list(stage)]
    return [[site] for site in stage]


def lean(group: Sequence[Stage], observed: Sequence[Observed]) -> None:
    """Let the experts of each pool lean on all of them with the weight of one token an input: with fewer than that, an
    expert's own Gram has no full rank."""
    pools: dict[str, list[Statistic]] = {}
    for stage, seen in zip(group, observed, strict=True):
        if stage[0].pool:
            pools.setdefault(stage[0].pool, []).append(seen.statistic)
    columns = {stage[0].pool: stage[0].columns for stage in group}
    for pool, statistics in pools.items():
        lean_on_pool(statistics, columns[pool])


def solve(batch: Batch, dense: Sequence[Sequence[Tensor]], recipe: Recipe) -> list[list[Solution]]:
    """The recipe's solutions for the weights `dense`, (out, in) each, as `batch.stacks` has their sites.

    Raises:
        InputError: the method cannot work with what the sites are fed; they are named.
    """
    rows = batch.rows()
    pattern = Stacked(batch.pattern, tuple(rows)) if len(rows) > 1 else batch.pattern
    try:
        aims = [seen.aim(torch.cat(list(w)) if len(w) > 1 else w[0]) for w, seen in zip(dense, batch.seen, strict=True)]
        statistics = [seen.statistic for seen in batch.seen]
        if len(aims) == 1:
            found = [_solve(aims[0], statistics[0], pattern, recipe)]
        else:
            found = _solve(torch.stack(aims), type(statistics[0]).batch(statistics), pattern, recipe).unbind()
    except InputError as error:
        names = ", ".join(site.name for site in batch.sites())
        raise InputError(f"{names}: {error}; another calibration text may help") from None
    return [solution.split(rows) for solution in found]


def _solve(aim: Tensor, statistic: Statistic, pattern: Pattern, recipe: Recipe) -> Solution:
    """The method's solution, refitted where the recipe says so."""
    solution = solvers.load(recipe.method).solve(aim, statistic, pattern)
    if not recipe.refit:
        return solution
    assert isinstance(statistic, Gram)
    fit = masked_least_squares(statistic.mean(), aim, solution.mask, solution.weight)
    return replace(solution, weight=fit.weight, notes={**solution.notes, "residual": fit.residual, "steps": fit.steps})
