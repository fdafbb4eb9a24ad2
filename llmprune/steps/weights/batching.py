"""What a method is given at once: a stage's small matrices as one, experts' matrices in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.models.sites import Site, Stage
from llmprune.numerics.patterns import Pattern
from llmprune.solvers import METHODS
from llmprune.solvers.base import Solution
from llmprune.steps.weights.observing import Observed

_STACK = 4  # rows a column up to which a stage is solved as one matrix: beyond, only memory would grow
# weights and Grams of experts that are solved at once: on a CPU as many as stay in its cache, beyond which it gets slower
_BATCH_BYTES = {"cpu": 2**22, "cuda": 2**28}


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

    def dense(self) -> list[Tensor]:
        """Float32 copies of the weights of each stack, those of its sites one below the other.

        Raises:
            InputError: they are not finite.
        """
        return [_weights(stack) for stack in self.stacks]

    def by_site(self, dense: Sequence[Tensor], found: Solution) -> Iterator[tuple[Site, Observed, Tensor, Solution]]:
        """Each site with what it was fed, its dense weights and its part of the solution."""
        each = found.unbind() if len(self.stacks) > 1 else [found]
        for stack, seen, before, after in zip(self.stacks, self.seen, dense, each, strict=True):
            rows = [site.rows for site in stack]
            for site, w, own in zip(stack, before.split(rows), after.split(rows), strict=True):
                yield site, seen, w, own

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


def _weights(stack: Sequence[Site]) -> Tensor:
    for site in stack:
        if not bool(torch.isfinite(site.weight).all()):
            raise InputError(f"the weights of {site.name} hold NaN or infinity")
    if len(stack) == 1:
        return stack[0].weight.to(torch.float32, copy=True)
    return torch.cat([site.weight.float() for site in stack])


def make_batches(
    group: Sequence[Stage], observed: Sequence[Observed], patterns: Mapping[str, Pattern], method: str
) -> list[Batch]:
    """Put together what `method` can solve at once."""
    solver = METHODS.get(method)
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
