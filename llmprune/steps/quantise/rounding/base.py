"""The protocol of a rounding: a module with one pure function."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from llmprune.numerics.stats import Gram
from llmprune.steps.quantise.grid import Grid, Quantised


class Rounding(Protocol):
    """Every module in this package, `base` aside, is one. Rows do not bear on each other, so that processes can share them."""

    corrected: bool  # whether it imitates what the model puts out that is not quantised, or the weights as they are

    def quantise(self, target: Tensor, kept: Tensor | None, stat: Gram, grid: Grid) -> Quantised:
        """The weights `target` (out, in), float32 and left unchanged, on `grid`.

        Args:
            kept: (out, in) bool, False where weights were pruned: their codes are 0; None: nowhere.
            stat: of the inputs.
        """
        ...
