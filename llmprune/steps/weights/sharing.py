"""Solving, and how processes share it: each solves a batch of its own or, where rows do not bear on each other, its rows of
every batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.base.precision import full_float32
from llmprune.base.processes import Ranks
from llmprune.job.recipes import Recipe
from llmprune.numerics.linalg import masked_least_squares
from llmprune.numerics.patterns import Pattern, Stacked
from llmprune.numerics.stats import Gram, Statistic
from llmprune.solvers import METHODS
from llmprune.solvers.base import Solution
from llmprune.steps.weights.batching import Batch


@dataclass(frozen=True, slots=True)
class Share:
    """Rows of the matrices of a batch, for one process to solve."""

    batch: Batch
    start: int
    stop: int

    @full_float32()
    def solve(self, dense: Sequence[Tensor], recipe: Recipe) -> Solution:
        """The recipe's solution for these rows of the weights `dense`, (out, in) each."""
        rows, seen = self.batch.rows(), self.batch.seen
        pattern: Pattern = self.batch.pattern
        if len(rows) > 1 and self.stop - self.start == sum(rows):
            pattern = Stacked(pattern, tuple(rows))
        targets = [one.target(w[self.start : self.stop]) for w, one in zip(dense, seen, strict=True)]
        statistics = [one.statistic for one in seen]
        if len(targets) == 1:
            return _solve(targets[0], statistics[0], pattern, recipe)
        return _solve(torch.stack(targets), type(statistics[0]).batch(statistics), pattern, recipe)

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
    solver = METHODS.get(method)
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


def _solve(target: Tensor, statistic: Statistic, pattern: Pattern, recipe: Recipe) -> Solution:
    """The method's solution, refitted where the recipe says so."""
    solver = METHODS.get(recipe.method)
    if not recipe.refit:
        return solver.solve(target, statistic, pattern)
    solution = getattr(solver, "search", solver.solve)(target, statistic, pattern)
    assert isinstance(statistic, Gram)
    fit = masked_least_squares(statistic.mean(), target, solution.mask, solution.weight)
    return replace(solution, weight=fit.weight, notes={**solution.notes, "residual": fit.residual, "steps": fit.steps})
