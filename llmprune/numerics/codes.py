"""Codes: whole numbers of few bits, packed into words of 32, the first in the lowest bits, none of them wasted."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional

_WORD = 32
_CHUNK = 2**22  # codes that are packed at once


def words(columns: int, bits: int) -> int:
    """That a row of `columns` codes takes."""
    return -(-columns * bits // _WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes` (rows, columns), whole numbers from -2^(bits-1) on, as int32 (rows, words); each with 2^(bits-1) added."""
    return torch.cat([_pack(part, bits) for part in codes.split(max(_CHUNK // codes.shape[1], 1))])


def _pack(codes: Tensor, bits: int) -> Tensor:
    positive = (codes.int() + 2 ** (bits - 1)).to(torch.uint8)
    stream = (positive[..., None] >> _shifts(bits, codes.device)) & 1
    stream = functional.pad(stream.flatten(1), (0, words(codes.shape[1], bits) * _WORD - codes.shape[1] * bits))
    octets = (stream.unflatten(1, (-1, 8)) << _shifts(8, codes.device)).sum(-1, dtype=torch.uint8)
    return _native(octets).view(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """What `pack` packed, int8 (rows, columns)."""
    return torch.cat([_unpack(part, bits, columns) for part in packed.split(max(_CHUNK // columns, 1))])


def _unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    octets = _native(packed.contiguous().view(torch.uint8))
    stream = ((octets[..., None] >> _shifts(8, packed.device)) & 1).flatten(1)[:, : columns * bits]
    positive = (stream.unflatten(1, (columns, bits)) << _shifts(bits, packed.device)).sum(-1, dtype=torch.int16)
    return (positive - 2 ** (bits - 1)).to(torch.int8)


def values(codes: Tensor, scales: Tensor) -> Tensor:
    """The weights (rows, columns) that `codes` and `scales` (rows, groups) stand for, as compressed-tensors computes them."""
    return codes.to(scales.dtype) * scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


def _shifts(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=device)


def _native(octets: Tensor) -> Tensor:
    """Bytes of words, lowest first, in this machine's order; and back."""
    if sys.byteorder == "little":
        return octets
    return octets.unflatten(1, (-1, _WORD // 8)).flip(-1).flatten(1)
