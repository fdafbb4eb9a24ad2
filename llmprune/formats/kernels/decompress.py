"""W from its packed form into a dense scratch matrix: the road for many tokens, where a dense product follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.formats.kernels.bits import expand

_ROWS = 32  # a program


@triton.jit
def _put(out_ptr, rows, groups, word01, word23, N, total, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Two words a group, side by side; `total` groups a row are not padding."""
    words = tl.join(word01, word23).reshape(ROWS, 2 * WORDS)
    at = 2 * groups + tl.arange(0, 2 * WORDS)
    mask = (rows < N)[:, None] & (at < 2 * total)[None, :]
    tl.store(out_ptr + rows[:, None] * (2 * total) + at[None, :], words, mask=mask)


@triton.jit
def _decompress(
    values_ptr, meta_ptr, out_ptr, N, total, chunks, ROWS: tl.constexpr, WORDS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    chunk = tl.program_id(1)
    word = tl.arange(0, WORDS)
    there = (rows < N)[:, None]
    meta = tl.load(meta_ptr + (rows[:, None] * chunks + chunk) * WORDS + word[None, :], mask=there, other=0)
    for half in tl.static_range(2):
        group = (chunk * 8 + half * 4) * WORDS
        at = values_ptr + rows[:, None] * (chunks * 8 * WORDS) + (group + word)[None, :]
        v0 = tl.load(at, mask=there, other=0)
        v1 = tl.load(at + WORDS, mask=there, other=0)
        v2 = tl.load(at + 2 * WORDS, mask=there, other=0)
        v3 = tl.load(at + 3 * WORDS, mask=there, other=0)
        a0, b0, a1, b1, a2, b2, a3, b3 = expand(meta >> (16 * half), v0, v1, v2, v3, FAST)
        _put(out_ptr, rows, group, a0, b0, N, total, ROWS, WORDS)
        _put(out_ptr, rows, group + WORDS, a1, b1, N, total, ROWS, WORDS)
        _put(out_ptr, rows, group + 2 * WORDS, a2, b2, N, total, ROWS, WORDS)
        _put(out_ptr, rows, group + 3 * WORDS, a3, b3, N, total, ROWS, WORDS)


def decompress24(values: Tensor, meta: Tensor, columns: int, *, fast: bool) -> Tensor:
    """The dense matrix (rows, columns), of 16-bit values; see `decode24` for `fast`."""
    rows, chunks, width = meta.shape
    out = torch.empty(rows, columns, dtype=values.dtype, device=values.device)
    _decompress[triton.cdiv(rows, _ROWS), chunks](
        values.view(torch.int32), meta, out.view(torch.int32), rows, columns // 4, chunks,
        ROWS=_ROWS, WORDS=width, FAST=fast, num_warps=4,
    )  # fmt: skip
    return out
