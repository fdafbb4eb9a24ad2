"""The protocol of a pruning method: a module with a statistic and one pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Statistic


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solver found.

    Attributes:
        weight: (out, in) float32, zero wherever `mask` is False.
        mask: (out, in) bool, True where kept; has the pattern's exact count.
        notes: numbers worth recording, such as the damping that was needed.
    """

    weight: Tensor
    mask: Tensor
    notes: Mapping[str, float] = field(default_factory=dict)

    def unbind(self) -> list[Solution]:
        """The solutions of the matrices of a batch."""
        return [Solution(*parts, self.notes) for parts in zip(self.weight, self.mask, strict=True)]

    def split(self, rows: Sequence[int]) -> list[Solution]:
        """The solutions of the matrices that were stacked, `rows` of each."""
        return [Solution(*parts, self.notes) for parts in zip(self.weight.split(rows), self.mask.split(rows), strict=True)]


class Solver(Protocol):
    """Every module in this package, `base` aside, is one. It knows matrices only: no model, no files, no devices.

    One that ends with least squares on its mask may have `search` beside `solve`, which leaves that to a refit that follows.
    """

    statistic: type[Statistic]
    stackable: bool  # whether rows bear on each other through `pattern.keep` alone, so that matrices can be stacked
    true_sequential: bool  # whether a block is solved stage by stage where the user does not say: as the method was published
    products: int  # of a weight with its Gram, about as many as solving takes: the preflight's estimate of time
    batched: bool  # whether it also takes several matrices at once, w (batch, out, in), each with a statistic of its own

    def solve(self, w: Tensor, stat: Any, pattern: Pattern) -> Solution:
        """Prune `w` (out, in), float32 and left unchanged, given `stat`, an instance of `statistic`."""
        ...


def masked(w: Tensor, mask: Tensor) -> Solution:
    """`w` with the dropped weights set to +0.0 (a product would leave -0.0 and keep NaN)."""
    return Solution(w.masked_fill(~mask, 0), mask)
