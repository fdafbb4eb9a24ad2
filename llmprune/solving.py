"""What a method is given at once, and what it finds: a stage's small matrices as one, experts' matrices in a batch.

Where several processes share a run, each solves a part: a batch of its own or, where rows do not bear on each other, its
rows of every batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from llmprune import solvers
from llmprune.clock import Clock
from llmprune.errors import InputError
from llmprune.linalg import masked_least_squares
from llmprune.models.sites import Site, Stage
from llmprune.patterns import Pattern, Stacked
from llmprune.ranks import Ranks
from llmprune.recipes import Recipe
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

    def add_up(self, ranks: Ranks) -> None:
        """Count what the other processes counted. The sample stays this one's."""
        for tensor in self.statistic.sums():
            ranks.add_up(tensor)
        counts = ranks.totals(self.statistic.tokens, self.sample.tokens)
        self.statistic.tokens, self.sample.tokens = (int(count) for count in counts)
        if self.cross is not None:
            ranks.add_up(self.cross.sum)
            self.cross.tokens = self.statistic.tokens

    def aim(self, w: Tensor) -> Tensor:
        """The weights to imitate on the pruned model's inputs."""
        if self.cross is None:
            return w
        assert isinstance(self.statistic, Gram)
        return self.cross.aim(w, self.statistic, BLEND)


@dataclass(frozen=True, slots=True, eq=False)
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

    def cost(self) -> int:
        """Of solving it, in no unit."""
        columns = self.stacks[0][0].columns
        return len(self.stacks) * columns**2 * (columns + sum(self.rows()))

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


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of the matrices of a batch, for one process to solve."""

    batch: Batch
    start: int
    stop: int

    def solve(self, dense: Sequence[Tensor], recipe: Recipe) -> Solution:
        """The recipe's solution for these rows of the weights `dense`, (out, in) each."""
        rows, seen = self.batch.rows(), self.batch.seen
        pattern: Pattern = self.batch.pattern
        if len(rows) > 1 and self.stop - self.start == sum(rows):
            pattern = Stacked(pattern, tuple(rows))
        aims = [one.aim(w[self.start : self.stop]) for w, one in zip(dense, seen, strict=True)]
        statistics = [one.statistic for one in seen]
        if len(aims) == 1:
            return _solve(aims[0], statistics[0], pattern, recipe)
        return _solve(torch.stack(aims), type(statistics[0]).batch(statistics), pattern, recipe)

    def blank(self, notes: Mapping[str, float]) -> Solution:
        """Room for what another process finds."""
        first = self.batch.stacks[0][0]
        count = len(self.batch.stacks)
        shape = (*((count,) if count > 1 else ()), self.stop - self.start, first.columns)
        weight = torch.empty(shape, device=first.weight.device)
        return Solution(weight, torch.empty_like(weight, dtype=torch.bool), notes)


Round: TypeAlias = list[Share]  # what the processes solve at the same time: the first process the first share, and so on


def make_rounds(batches: Sequence[Batch], method: str, size: int) -> list[Round]:
    """Divide the work among `size` processes: rows where they can be divided, else batches that cost much the same."""
    solver = solvers.load(method)
    rounds: list[Round] = []
    whole: list[Share] = []
    for batch in batches:
        rows = sum(batch.rows())
        if size > 1 and solver.stackable and batch.pattern.rowwise and rows >= size:
            cuts = [rank * rows // size for rank in range(size + 1)]
            rounds.append([Share(batch, *cut) for cut in itertools.pairwise(cuts)])
        else:
            whole.append(Share(batch, 0, rows))
    if size > 1:
        whole.sort(key=lambda share: share.batch.cost(), reverse=True)
    return rounds + [whole[i : i + size] for i in range(0, len(whole), size)]


def solve(work: Round, dense: Mapping[Batch, Sequence[Tensor]], recipe: Recipe, ranks: Ranks) -> dict[Batch, Solution]:
    """The recipe's solution of each batch in `work`, of which this process finds its share.

    Args:
        dense: the weights (out, in) of a batch's stacks, each the sites one below the other.

    Raises:
        InputError: the method cannot work with what the sites are fed; they are named.
    """
    own, told = None, None
    if ranks.rank < len(work):
        own, told = _attempt(work[ranks.rank], dense, recipe)
    answers = ranks.all(told)
    if errors := [answer for answer in answers if isinstance(answer, str)]:
        raise InputError(errors[0])
    notes = [answer if isinstance(answer, Mapping) else {} for answer in answers]
    parts: dict[Batch, list[Solution]] = {}
    for rank, share in enumerate(work):
        found = own if own is not None and rank == ranks.rank else share.blank(notes[rank])
        part = Solution(ranks.of(rank, found.weight), ranks.of(rank, found.mask), found.notes)
        parts.setdefault(share.batch, []).append(part)
    return {batch: _joined(own) for batch, own in parts.items()}


def _attempt(
    share: Share, dense: Mapping[Batch, Sequence[Tensor]], recipe: Recipe
) -> tuple[Solution | None, Mapping[str, float] | str]:
    """The solution and its notes; or none, and why, for all processes to hear."""
    try:
        found = share.solve(dense[share.batch], recipe)
    except InputError as error:
        names = ", ".join(site.name for site in share.batch.sites())
        return None, f"{names}: {error}; another calibration text may help"
    return found, found.notes


def _joined(parts: Sequence[Solution]) -> Solution:
    """The rows of a batch, put together again; of each note the largest."""
    if len(parts) == 1:
        return parts[0]
    notes = {name: max(part.notes[name] for part in parts) for name in parts[0].notes}
    return Solution(torch.cat([p.weight for p in parts], dim=-2), torch.cat([p.mask for p in parts], dim=-2), notes)


def _solve(aim: Tensor, statistic: Statistic, pattern: Pattern, recipe: Recipe) -> Solution:
    """The method's solution, refitted where the recipe says so."""
    solution = solvers.load(recipe.method).solve(aim, statistic, pattern)
    if not recipe.refit:
        return solution
    assert isinstance(statistic, Gram)
    fit = masked_least_squares(statistic.mean(), aim, solution.mask, solution.weight)
    return replace(solution, weight=fit.weight, notes={**solution.notes, "residual": fit.residual, "steps": fit.steps})
