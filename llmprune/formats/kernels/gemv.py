"""y = x Wᵀ for one or two tokens, without tensor cores: of each group the two inputs that its values meet are picked by code.

For so few tokens reading W decides, and what is left to do is little: two multiplications a group, in float32. Each thread
reads its part of W straight into registers, many bytes at once, and waits for no other thread until its row ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.formats.kernels.bits import expand, pick_bfloat16, pick_float16
from llmprune.formats.kernels.plan import Rows, rows_of

MOST = 2  # tokens
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _low(word, dtype: tl.constexpr):
    return word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _pair(a, x01, dtype: tl.constexpr):
    """The products of the two 16-bit halves of words `a` and `x01`, added."""
    return _low(a, dtype) * _low(x01, dtype) + _low(a >> 16, dtype) * _low(x01 >> 16, dtype)


@triton.jit
def _add(total, codes, v0, v1, v2, v3, x_ptr, group, limit, WORDS: tl.constexpr, dtype: tl.constexpr, FAST: tl.constexpr):
    """`total` plus the products of four groups, WORDS groups apart, from `group` on. `x_ptr` has a group an element."""
    x0 = tl.load(x_ptr + group, mask=group < limit, other=0)[None, :]
    x1 = tl.load(x_ptr + group + WORDS, mask=group + WORDS < limit, other=0)[None, :]
    x2 = tl.load(x_ptr + group + 2 * WORDS, mask=group + 2 * WORDS < limit, other=0)[None, :]
    x3 = tl.load(x_ptr + group + 3 * WORDS, mask=group + 3 * WORDS < limit, other=0)[None, :]
    a0, a1, a2, a3 = x0.to(tl.int32), x1.to(tl.int32), x2.to(tl.int32), x3.to(tl.int32)
    b0, b1, b2, b3 = (x0 >> 32).to(tl.int32), (x1 >> 32).to(tl.int32), (x2 >> 32).to(tl.int32), (x3 >> 32).to(tl.int32)
    if FAST:
        if dtype == tl.bfloat16:
            return pick_bfloat16(total, codes, v0, v1, v2, v3, a0, b0, a1, b1, a2, b2, a3, b3)
        return pick_float16(total, codes, v0, v1, v2, v3, a0, b0, a1, b1, a2, b2, a3, b3)
    w0, u0, w1, u1, w2, u2, w3, u3 = expand(codes, v0, v1, v2, v3, FAST)
    total += _pair(w0, a0, dtype) + _pair(u0, b0, dtype) + _pair(w1, a1, dtype) + _pair(u1, b1, dtype)
    return total + _pair(w2, a2, dtype) + _pair(u2, b2, dtype) + _pair(w3, a3, dtype) + _pair(u3, b3, dtype)


@triton.jit(do_not_specialize=["N", "chunks"])
def _gemv(
    values_ptr, meta_ptr, x_ptr, bias_ptr, y_ptr, N, groups, chunks,
    ROWS: tl.constexpr, WORDS: tl.constexpr, CHUNKS: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr,
    FAST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """`values_ptr` has one element a group, of 32 bits, `x_ptr` of 64. A program takes CHUNKS chunks of ROWS rows at a time."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = tl.minimum(rows, N - 1).to(tl.int64)[:, None]  # rows past the end repeat the last one, and are not stored
    place = tl.arange(0, CHUNKS * WORDS)
    first = tl.zeros((ROWS, CHUNKS * WORDS), tl.float32)
    second = first
    for start in range(0, chunks, CHUNKS):
        chunk = start + place // WORDS
        inside = tl.minimum(chunk, chunks - 1)[None, :]  # chunks past the end repeat the last one, with inputs of zero
        word = (place % WORDS)[None, :]
        meta = tl.load(meta_ptr + (there * chunks + inside) * WORDS + word)
        values = values_ptr + (there * chunks + inside) * (8 * WORDS) + word
        for half in tl.static_range(2):
            v0 = tl.load(values + half * 4 * WORDS)
            v1 = tl.load(values + half * 4 * WORDS + WORDS)
            v2 = tl.load(values + half * 4 * WORDS + 2 * WORDS)
            v3 = tl.load(values + half * 4 * WORDS + 3 * WORDS)
            codes = meta >> (16 * half)
            group = chunk * (8 * WORDS) + half * 4 * WORDS + place % WORDS
            first = _add(first, codes, v0, v1, v2, v3, x_ptr, group, groups, WORDS, dtype, FAST)
            if TOKENS == 2:
                second = _add(second, codes, v0, v1, v2, v3, x_ptr + groups, group, groups, WORDS, dtype, FAST)
    _store(y_ptr, bias_ptr, tl.sum(first, 1), rows, N, BIAS)
    if TOKENS == 2:
        _store(y_ptr + N, bias_ptr, tl.sum(second, 1), rows, N, BIAS)


@triton.jit
def _store(y_ptr, bias_ptr, total, rows, N, BIAS: tl.constexpr):
    if BIAS:
        total += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows, total.to(y_ptr.dtype.element_ty), mask=rows < N)


def gemv24(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, *, fast: bool = True, settings: Rows | None = None
) -> Tensor:
    """x (tokens, columns) times Wᵀ, plus the bias, (tokens, rows), for at most `MOST` tokens; see `decode24`."""
    x = x.contiguous()
    (tokens, columns), (rows, chunks, width) = x.shape, meta.shape
    own = settings or rows_of(chunks)
    y = torch.empty(tokens, rows, dtype=x.dtype if fast else torch.float32, device=x.device)  # the interpreter rounds wrongly
    _gemv[(triton.cdiv(rows, own.rows),)](
        values.view(torch.int32), meta, x.view(torch.int64), y if bias is None else bias, y, rows, columns // 4, chunks,
        ROWS=own.rows, WORDS=width, CHUNKS=own.chunks, TOKENS=tokens, BIAS=bias is not None,
        FAST=fast, dtype=_DTYPES[x.dtype], num_warps=own.warps,
    )  # fmt: skip
    return y.to(x.dtype)
