"""2:4 matrices packed and unpacked in plain torch: the truth that kernels are tested against, and the CPU's road.

Of each group of four consecutive weights of a row, two values are kept, and a code says where they stand. In memory the codes
lie as kernels read them: eight groups a 32-bit word, spread so that whole vectors of groups are decoded without a gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.base.words import count

POSITIONS = tuple(combinations(range(4), 2))  # of the two values of a group, by code: (0, 1), (0, 2), ... (2, 3)
PLANES = 8  # groups a word
_WIDE, _NARROW = 16, 8  # words a chunk
_TILE = 2**20  # weights that are unpacked at once on the CPU


@dataclass(frozen=True, slots=True)
class Packed:
    """A 2:4 matrix (rows, columns), its columns padded with zeros to whole chunks.

    Attributes:
        values: (rows, padded columns / 2), the two kept values of each group in order.
        meta: (rows, chunks, words) int32. The four bits p of word w of a chunk are the code of its group p * words + w.
        columns: how many there are without padding.
    """

    values: Tensor
    meta: Tensor
    columns: int


def violation(weight: Tensor) -> str | None:
    """Why a matrix (rows, columns) is not 2:4; None if it is."""
    if weight.shape[1] % 4:
        return f"its width of {count(weight.shape[1], 'column')} is not a multiple of 4"
    counts = (weight.unflatten(1, (-1, 4)) != 0).sum(-1)
    if bool((counts <= 2).all()):
        return None
    row, group = (int(i) for i in (counts > 2).nonzero()[0])
    return f"row {row}, columns {4 * group} to {4 * group + 3}: {int(counts[row, group])} nonzeros, 2 allowed"


def compress(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix's values (rows, columns / 2), and codes (rows, columns / 4) uint8.

    Where a group has fewer than two nonzeros, a negative zero is kept before a positive one, so that unpacking gives back all
    bits; a third entry that is a negative zero becomes a positive one.

    Raises:
        ValueError: it is not 2:4.
    """
    if why := violation(weight):
        raise ValueError(why)
    groups = weight.unflatten(1, (-1, 4))
    key = torch.zeros(groups.shape[:2], dtype=torch.int64, device=weight.device)
    for i in range(4):
        one = groups[..., i]
        key += (one != 0).long() << i
        key += ((one == 0) & one.signbit()).long() << (4 + i)
    codes = _codes(weight.device)[key]
    places = _places(weight.device)[codes.long()]
    return groups.gather(-1, places).flatten(1).contiguous(), codes


@cache
def _places(device: torch.device) -> Tensor:
    """Where the two values of a group stand, by code; kept, as nothing may be copied to a device while a graph is captured."""
    return torch.tensor(POSITIONS, device=device)


@cache
def _codes(device: torch.device) -> Tensor:
    """The code of a group, by which of its entries are nonzero (bits 0 to 3) and which negative zeros (bits 4 to 7)."""

    def code(key: int) -> int:
        rank = sorted(range(4), key=lambda i: (not key >> i & 1, not key >> (4 + i) & 1, i))
        first, second = sorted(rank[:2])
        return POSITIONS.index((first, second))

    return torch.tensor([code(key) for key in range(256)], dtype=torch.uint8, device=device)


def words(codes: Tensor) -> Tensor:
    """Codes (rows, groups) as kernels read them: (rows, chunks, words) int32. Padding has code 0."""
    rows, groups = codes.shape
    width = chunk_words(4 * groups)
    chunks = -(-groups // (PLANES * width))
    padded = functional.pad(codes, (0, chunks * PLANES * width - groups)).view(rows, chunks, PLANES, width).int()
    found = torch.zeros(rows, chunks, width, dtype=torch.int32, device=codes.device)
    for plane in range(PLANES):
        found |= padded[:, :, plane] << (4 * plane)  # a code is at most 5: the sign bit stays clear
    return found


def chunk_words(columns: int) -> int:
    """Words a chunk, of 32 columns each: the wide kind unless that would pad more."""
    wide, narrow = 4 * PLANES * _WIDE, 4 * PLANES * _NARROW
    return _WIDE if -(-columns // wide) * wide == -(-columns // narrow) * narrow else _NARROW


def pack(weight: Tensor) -> Packed:
    """Raises: ValueError: the matrix is not 2:4."""
    return arrange(*compress(weight))


def arrange(values: Tensor, codes: Tensor) -> Packed:
    """Values and codes as `compress` gives them, in the layout of kernels."""
    meta = words(codes)
    padded = meta[0].numel() * 4 * PLANES if len(meta) else 0
    return Packed(functional.pad(values, (0, padded // 2 - values.shape[1])).contiguous(), meta, 2 * values.shape[1])


def codes_of(packed: Packed) -> Tensor:
    """(rows, columns / 4) uint8."""
    planes = torch.stack([(packed.meta >> (4 * plane)) & 15 for plane in range(PLANES)], dim=2)
    return planes.flatten(1)[:, : packed.columns // 4].to(torch.uint8)


def unpack(packed: Packed) -> Tensor:
    """(rows, columns)."""
    return expand(packed.values[:, : packed.columns // 2], codes_of(packed))


def expand(values: Tensor, codes: Tensor) -> Tensor:
    """The matrix of values (rows, columns / 2) and codes (rows, columns / 4)."""
    if values.dtype.itemsize == 2:
        return _expand_half(values, codes)
    places = _places(values.device)[codes.long()]
    dense = values.new_zeros(*codes.shape, 4)
    return dense.scatter_(-1, places, values.unflatten(1, (-1, 2))).flatten(1)


def _expand_half(values: Tensor, codes: Tensor) -> Tensor:
    """16-bit values: a group is one 64-bit word into which its two values are shifted."""
    pair = values.contiguous().view(torch.int16).unflatten(1, (-1, 2)).long() & 0xFFFF
    where = 16 * _places(values.device)[codes.long()]
    word = (pair[..., 0] << where[..., 0]) | (pair[..., 1] << where[..., 1])
    return word.view(values.dtype)


def linear24(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """`x` (..., columns) times the matrix's transpose, plus `bias`: (..., rows)."""
    rows = len(packed.values)
    step = max(_TILE // max(packed.columns, 1), 1)
    parts = []
    for i in range(0, rows, step):
        tile = Packed(packed.values[i : i + step], packed.meta[i : i + step], packed.columns)
        parts.append(functional.linear(x, unpack(tile), None if bias is None else bias[i : i + step]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
