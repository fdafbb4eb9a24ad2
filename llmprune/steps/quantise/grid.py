"""Codes of few bits: a weight is a whole number times a scale, which the weights of a group of columns share.

Zero is code 0: what was pruned stays exactly zero. A weight that was kept may be rounded to it, as to any other code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """
    Attributes:
        bits: of a code.
        group: columns that share a scale; divides the columns of the matrix.
        storage: dtype of the scales in files.
    """

    bits: int
    group: int
    storage: torch.dtype

    @property
    def least(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def most(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def nearest(self, wanted: Tensor, kept: Tensor | None) -> Tensor:
        """The codes nearest to `wanted`, weights divided by their scales; zero where not `kept`."""
        codes = wanted.round().clamp_(self.least, self.most)
        return codes if kept is None else codes.mul_(kept)

    def stored(self, scales: Tensor) -> Tensor:
        """Scales as files have them, in float32. Those too small for that are 1, the weights being as good as zero."""
        rounded = scales.to(self.storage).float()
        return torch.where(rounded > 0, rounded, 1.0)

    def spread(self, scales: Tensor) -> Tensor:
        """Of each weight (out, in), from those of the groups (out, groups)."""
        return scales.repeat_interleave(self.group, dim=-1)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix on a grid.

    Attributes:
        codes: (out, in), whole numbers in float32.
        scales: (out, groups) in float32, as stored.
    """

    grid: Grid
    codes: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        """(out, in) in float32."""
        return self.codes * self.grid.spread(self.scales)
