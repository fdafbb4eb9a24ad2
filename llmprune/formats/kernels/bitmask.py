"""Sparse matrices as one bit a weight and the values that are not zero, in plain torch: the truth for any kernel.

A matrix (rows, columns), padded with zeros to whole tiles of 8 rows by 64 columns, is stored tile by tile: strips of 8 rows
from the top, each strip's tiles from the left. So whoever computes some strips reads one stretch of the mask and one of the
values.

- mask, uint8 (strips, chunks, 8, 8): bit b of byte a of row r of a tile says whether the weight in its column 8a + b is stored.
- values, in the order of the mask's bits: weights of the matrix's dtype; or codes, which are weights once multiplied by the
  scale of their group of columns: int8 (codes of 8 bits), or uint8, two codes a byte, the first in the low half, 8 added to
  each (codes of 4 bits or fewer). A tile's row begins with a byte of its own; a spare half, after an odd number of codes, is 8.
- scale (rows, groups), with codes: each of columns / groups columns of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.numerics import codes as rounding

STRIP, CHUNK = 8, 64
_AT_ONCE = 2**20  # weights that are expanded at once
_HALF = 8  # what is added to a code of half a byte
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Bitmask:
    """A matrix as the module says.

    Attributes:
        starts: int64 (strips + 1), where in `values` each strip begins.
        scale: None where the values are weights.
    """

    mask: Tensor
    values: Tensor
    starts: Tensor
    scale: Tensor | None
    rows: int
    columns: int

    def strips(self, first: int, last: int) -> Bitmask:
        """Some strips, as a matrix."""
        start, end = self.starts[first], self.starts[last]
        own = slice(first * STRIP, min(last * STRIP, self.rows))
        return Bitmask(
            self.mask[first:last],
            self.values[int(start) : int(end)],
            self.starts[first : last + 1] - start,
            None if self.scale is None else self.scale[own],
            own.stop - own.start,
            self.columns,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Bitmask:
        """A copy whose weights, or scales, are of `dtype`."""
        values = self.values.to(device, dtype if self.scale is None else self.values.dtype, copy=True)
        scale = None if self.scale is None else self.scale.to(device, dtype, copy=True)
        return replace(self, mask=self.mask.to(device, copy=True), values=values, starts=self.starts.to(device), scale=scale)

    def parts(self, weights: int | None = None) -> Iterator[Bitmask]:
        """All strips, on a CPU some at once, of about so many weights, so that they are expanded within its cache."""
        if self.mask.is_cuda:
            yield self
            return
        count = len(self.mask)
        step = _strips_of(weights or _AT_ONCE, self.columns)
        for first in range(0, count, step):
            yield self.strips(first, min(first + step, count))

    def stored(self) -> Tensor:
        """What is stored (rows, columns): weights, or codes as int8."""
        kept, values = _bits(self.mask), self.values
        if values.dtype == torch.uint8:
            values = _singles(values, kept.sum(-1))
        tiles = values.new_zeros(kept.shape).masked_scatter_(kept, values)
        return tiles.transpose(1, 2).flatten(2).flatten(0, 1)[: self.rows, : self.columns]

    def weight(self) -> Tensor:
        """The matrix (rows, columns)."""
        found = [part.stored() if part.scale is None else rounding.values(part.stored(), part.scale) for part in self.parts()]
        return torch.cat(found)

    def problem(self) -> str | None:
        """Why these tensors are no matrix; None if they are."""
        kept = _bits(self.mask).transpose(1, 2).flatten(2).flatten(0, 1)
        if bool(kept[self.rows :].any()) or bool(kept[:, self.columns :].any()):
            return "its mask has bits outside the matrix"
        if len(self.values) != int(self.starts[-1]):
            return f"it holds {len(self.values)} values, and its mask says {int(self.starts[-1])}"
        return None


def pack(matrix: Tensor, scale: Tensor | None = None, bits: int | None = None) -> Bitmask:
    """A matrix (rows, columns) of weights; or of codes of `bits`, int8, with their `scale`. A weight of -0.0 is stored."""
    step = _strips_of(_AT_ONCE, matrix.shape[1]) * STRIP
    halves = bits is not None and bits <= 4
    masks, values = zip(*(_pack(part, halves) for part in matrix.split(step)), strict=True)
    found = Bitmask(torch.cat(masks), torch.cat(values), torch.zeros(1), scale, matrix.shape[0], matrix.shape[1])
    return replace(found, starts=starts(found.mask, halves))


def tiled(octets: Tensor, values: Tensor) -> Bitmask:
    """A matrix of whole chunks that all store as many values.

    Args:
        octets: uint8 (rows, columns / 8), the mask row by row.
        values: (rows, chunks, values a chunk), weights.
    """
    rows, chunks, each = values.shape
    strips = -(-rows // STRIP)
    mask = functional.pad(octets, (0, 0, 0, strips * STRIP - rows)).view(strips, STRIP, chunks, CHUNK // 8).transpose(1, 2)
    ordered = torch.cat([strip.transpose(0, 1).flatten() for strip in values.split(STRIP)])
    starts = (torch.arange(strips + 1, device=values.device) * STRIP).clamp(max=rows) * chunks * each
    return Bitmask(mask.contiguous(), ordered, starts, None, rows, 8 * octets.shape[1])


def stacked(matrices: Sequence[Bitmask]) -> Bitmask:
    """Several of as many columns above each other; of all but the last, the rows are whole strips."""
    first, scales = matrices[0], [one.scale for one in matrices if one.scale is not None]
    ends = [0, *accumulate(int(one.starts[-1]) for one in matrices)]
    begun = [one.starts[:-1] + end for one, end in zip(matrices, ends, strict=False)]
    return Bitmask(
        torch.cat([one.mask for one in matrices]),
        torch.cat([one.values for one in matrices]),
        torch.cat([*begun, first.starts.new_tensor(ends[-1:])]),
        torch.cat(scales) if scales else None,
        sum(one.rows for one in matrices),
        first.columns,
    )


def starts(mask: Tensor, halves: bool) -> Tensor:
    """Where in the values each strip begins, from the mask; where `halves`, two codes share a byte."""
    counts = _bits(mask).sum(-1)
    return functional.pad(((counts + 1) // 2 if halves else counts).sum((1, 2)).cumsum(0), (1, 0))


def shape(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Of the mask."""
    return -(-rows // STRIP), -(-columns // CHUNK), STRIP, CHUNK // 8


def nbytes(rows: int, columns: int, kept: int, itemsize: int) -> int:
    """Of the mask and of so many weights that take `itemsize` bytes each."""
    return math.prod(shape(rows, columns)) + kept * itemsize


def _strips_of(weights: int, columns: int) -> int:
    """How many strips hold about so many weights."""
    return max(weights // (STRIP * max(columns, 1)), 1)


def _pack(matrix: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    strips, chunks, *_ = shape(*matrix.shape)
    padding = (0, chunks * CHUNK - matrix.shape[1], 0, strips * STRIP - matrix.shape[0])
    tiles = functional.pad(matrix, padding).view(strips, STRIP, chunks, CHUNK).transpose(1, 2).contiguous()
    kept = tiles.view(_SAME_SIZE[tiles.dtype.itemsize]) != 0
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=matrix.device)
    mask = (kept.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    values = tiles[kept]
    return mask, _pairs(values, kept.sum(-1)) if halves else values


def _bits(mask: Tensor) -> Tensor:
    """(strips, chunks, 8, 64) bool."""
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[..., None] >> places) & 1).bool().flatten(-2)


def _places(counts: Tensor) -> Tensor:
    """Which halves of bytes hold a code, for `counts` of each row of a tile; the others are spare."""
    places, counts = torch.arange(CHUNK, device=counts.device), counts.flatten()[:, None]
    return (places < counts)[places < counts + counts % 2]


def _pairs(codes: Tensor, counts: Tensor) -> Tensor:
    held = _places(counts)
    halves = torch.full(held.shape, _HALF, dtype=torch.uint8, device=codes.device)
    halves[held] = (codes + _HALF).to(torch.uint8)
    return halves[::2] | (halves[1::2] << 4)


def _singles(values: Tensor, counts: Tensor) -> Tensor:
    halves = torch.stack([values & 15, values >> 4], dim=1).flatten()
    return halves[_places(counts)].to(torch.int8) - _HALF
