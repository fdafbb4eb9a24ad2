"""One packed matrix: which encodings there are, what they store, and which one a matrix is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.formats.kernels import bitmask
from llmprune.formats.kernels.bitmask import Bitmask
from llmprune.formats.kernels.reference import POSITIONS, compress, expand, violation
from llmprune.numerics.codes import words

TWO_OF_FOUR, BITMASK = "2of4", "bitmask"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
_VALUES, _CODES, _MASK, _SCALE = ".values", ".codes", ".mask", ".scale"
_SHAPE_BYTES = 16  # of the shape that is stored with codes that are not packed


@dataclass(frozen=True, slots=True)
class TwoOfFour:
    """A 2:4 matrix: values (rows, columns / 2), codes (rows, columns / 4) uint8."""

    values: Tensor
    codes: Tensor

    def weight(self) -> Tensor:
        return expand(self.values, self.codes)

    def masked(self) -> Bitmask:
        """The same matrix as a mask and values, two of each group of four, zero or not."""
        if 4 * self.codes.shape[1] % bitmask.CHUNK:
            return bitmask.pack(self.weight())
        halves = torch.tensor([(1 << i) | (1 << j) for i, j in POSITIONS], dtype=torch.uint8)[self.codes.long()]
        octets = halves[:, ::2] | (halves[:, 1::2] << 4)
        return bitmask.tiled(octets, self.values.unflatten(1, (-1, bitmask.CHUNK // 2)))


@dataclass(frozen=True, slots=True)
class Layer:
    """What a packed folder says of a matrix.

    Attributes:
        dtype: of the weights.
        kind: its encoding.
        bits: of a code; None where weights are stored.
        groups: scales a row, of codes.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    kind: str
    bits: int | None = None
    groups: int | None = None

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Layer:
        """Raises: KeyError, TypeError, ValueError: it makes no sense."""
        (rows, columns), kind = entry["shape"], entry.get("kind", TWO_OF_FOUR)
        bits, groups = entry.get("bits"), entry.get("groups")
        sizes = [rows, columns, *([] if bits is None else [bits, groups])]
        if kind not in (TWO_OF_FOUR, BITMASK) or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(name)
        if kind == TWO_OF_FOUR and (columns % 4 or bits is not None):
            raise ValueError(name)
        if bits is not None and (bits > 8 or columns % groups):
            raise ValueError(name)
        return cls(rows, columns, _DTYPES[entry["dtype"]], kind, bits, groups)

    def entry(self) -> dict[str, Any]:
        codes = {} if self.bits is None else {"bits": self.bits, "groups": self.groups}
        return {"shape": [self.rows, self.columns], "dtype": str(self.dtype).removeprefix("torch."), "kind": self.kind} | codes

    @property
    def halves(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits is not None and self.bits <= 4

    def nbytes(self) -> int:
        """Of the matrix as it is stored where it is not packed."""
        if self.bits is None or self.groups is None:
            return self.rows * self.columns * self.dtype.itemsize
        return self.rows * (4 * words(self.columns, self.bits) + self.groups * self.dtype.itemsize) + _SHAPE_BYTES

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of its tensors; -1 is any size."""
        if self.kind == TWO_OF_FOUR:
            return {name + _VALUES: (self.rows, self.columns // 2), name + _CODES: (self.rows, -(-self.columns // 8))}
        found: dict[str, tuple[int, ...]] = {name + _MASK: bitmask.shape(self.rows, self.columns), name + _VALUES: (-1,)}
        return found | ({} if self.groups is None else {name + _SCALE: (self.rows, self.groups)})

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> TwoOfFour | Bitmask:
        """The matrix of its tensors.

        Raises:
            ValueError: they are not what they must be.
        """
        values = tensors[name + _VALUES]
        if self.kind == TWO_OF_FOUR:
            halves = tensors[name + _CODES]
            _check_dtypes((values, halves), (self.dtype, torch.uint8))
            codes = torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)[:, : self.columns // 4]
            if codes.numel() and int(codes.max()) > 5:
                raise ValueError(f"has a code of {int(codes.max())}, and 5 is the highest: the file is damaged")
            return TwoOfFour(values, codes.contiguous())
        mask, scale = tensors[name + _MASK], tensors.get(name + _SCALE)
        stored = self.dtype if self.bits is None else torch.uint8 if self.halves else torch.int8
        given = (values, mask) if scale is None else (values, mask, scale)
        _check_dtypes(given, (stored, torch.uint8, self.dtype)[: len(given)])
        found = Bitmask(mask, values, bitmask.starts(mask, self.halves), scale, self.rows, self.columns)
        if why := found.problem():
            raise ValueError(f"is damaged: {why}")
        return found


def _check_dtypes(tensors: tuple[Tensor, ...], wanted: tuple[torch.dtype, ...]) -> None:
    found = [str(tensor.dtype) for tensor in tensors]
    if found != [str(dtype) for dtype in wanted]:
        raise ValueError(f"is of {' and '.join(found)}, not {' and '.join(map(str, wanted))}")


def encode(name: str, weight: Tensor) -> tuple[Layer, dict[str, Tensor]] | str:
    """A matrix of weights as it takes the fewest bytes; or why not at all."""
    if weight.dtype not in _DTYPES.values():
        return f"of {weight.dtype}"
    rows, columns = weight.shape
    if violation(weight) is None:
        values, codes = compress(weight)
        even = functional.pad(codes, (0, codes.shape[1] % 2))
        tensors = {name + _VALUES: values, name + _CODES: (even[:, ::2] | (even[:, 1::2] << 4)).contiguous()}
        return Layer(rows, columns, weight.dtype, TWO_OF_FOUR), tensors
    return _masked(name, bitmask.pack(weight), Layer(rows, columns, weight.dtype, BITMASK))


def encode_codes(name: str, codes: Tensor, scale: Tensor, bits: int) -> tuple[Layer, dict[str, Tensor]] | str:
    """A matrix of codes, int8, with their scales (rows, groups), likewise."""
    layer = Layer(codes.shape[0], codes.shape[1], scale.dtype, BITMASK, bits, scale.shape[1])
    return _masked(name, bitmask.pack(codes, scale, bits), layer)


def _masked(name: str, found: Bitmask, layer: Layer) -> tuple[Layer, dict[str, Tensor]] | str:
    tensors = {name + _MASK: found.mask, name + _VALUES: found.values}
    if found.scale is not None:
        tensors[name + _SCALE] = found.scale
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size >= layer.nbytes():
        kept = int((found.stored() != 0).sum()) / (layer.rows * layer.columns)
        return f"{kept:.0%} of it is not zero, so that a mask and the rest would take more"
    return layer, tensors


def packed_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Of a 2:4 matrix whose weights take `itemsize` bytes each."""
    return rows * (columns // 2 * itemsize + -(-columns // 8))
