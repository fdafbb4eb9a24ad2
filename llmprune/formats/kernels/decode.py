"""y = x Wᵀ for few tokens: W is read packed, expanded in registers and multiplied on tensor cores.

Few tokens mean that reading W decides, so every byte of it is read once. W stands where a product has its large side, and
the tokens, padded to 8, 16 or 32, where it has its small one. The columns are divided among programs; their partial sums are
added in a fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.formats.kernels.bits import halves, prmt, select
from llmprune.formats.kernels.reference import PLANES

MOST = 32  # tokens
_ROWS = 128  # of W, a program
_WAVES = 3  # programs a multiprocessor, at least, where there are columns enough


@triton.jit
def _multiply(total, word01, word23, x_ptr, tokens, M, K, first, ROWS: tl.constexpr, WORDS: tl.constexpr, FAST: tl.constexpr):
    """Add the product of one plane of groups, the first of which starts at column `first`."""
    pair = tl.arange(0, 2 * WORDS)
    columns = first + (pair // 2) * 4 + pair % 2
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    real = (tokens < M)[:, None]
    x01 = tl.load(x_ptr + tokens[:, None] * K + columns[None, :], mask=real & (columns < K)[None, :], other=0.0)
    x23 = tl.load(x_ptr + tokens[:, None] * K + columns[None, :] + 2, mask=real & (columns + 2 < K)[None, :], other=0.0)
    w01, w23 = halves(word01, ROWS, WORDS, dtype), halves(word23, ROWS, WORDS, dtype)
    if FAST:
        total = tl.dot(w01, tl.trans(x01), total)
        return tl.dot(w23, tl.trans(x23), total)
    total += tl.dot(w01.to(tl.float32), tl.trans(x01).to(tl.float32), input_precision="ieee")
    return total + tl.dot(w23.to(tl.float32), tl.trans(x23).to(tl.float32), input_precision="ieee")


@triton.jit
def _decode(
    values_ptr, meta_ptr, x_ptr, partial_ptr, M, N, K, chunks, each,
    ROWS: tl.constexpr, WORDS: tl.constexpr, TOKENS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Partial sums (splits, M, N) in float32. `values_ptr` is of 32 bits: one element a group."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    split = tl.program_id(1)
    word, tokens = tl.arange(0, WORDS), tl.arange(0, TOKENS)
    there = (rows < N)[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for chunk in range(split * each, min((split + 1) * each, chunks)):
        meta = tl.load(meta_ptr + (rows[:, None] * chunks + chunk) * WORDS + word[None, :], mask=there, other=0)
        for half in tl.static_range(2):
            group = (chunk * 8 + half * 4) * WORDS
            at = values_ptr + rows[:, None] * (chunks * 8 * WORDS) + (group + word)[None, :]
            v0 = tl.load(at, mask=there, other=0)
            v1 = tl.load(at + WORDS, mask=there, other=0)
            v2 = tl.load(at + 2 * WORDS, mask=there, other=0)
            v3 = tl.load(at + 3 * WORDS, mask=there, other=0)
            codes = meta >> (16 * half)
            if FAST:
                a0, b0, a1, b1, a2, b2, a3, b3 = prmt(codes, v0, v1, v2, v3)
            else:
                a0, b0 = select(codes & 15, v0)
                a1, b1 = select((codes >> 4) & 15, v1)
                a2, b2 = select((codes >> 8) & 15, v2)
                a3, b3 = select((codes >> 12) & 15, v3)
            total = _multiply(total, a0, b0, x_ptr, tokens, M, K, 4 * group, ROWS, WORDS, FAST)
            total = _multiply(total, a1, b1, x_ptr, tokens, M, K, 4 * (group + WORDS), ROWS, WORDS, FAST)
            total = _multiply(total, a2, b2, x_ptr, tokens, M, K, 4 * (group + 2 * WORDS), ROWS, WORDS, FAST)
            total = _multiply(total, a3, b3, x_ptr, tokens, M, K, 4 * (group + 3 * WORDS), ROWS, WORDS, FAST)
    out = partial_ptr + (split * M + tokens[None, :]).to(tl.int64) * N + rows[:, None]
    tl.store(out, total, mask=there & (tokens < M)[None, :])


@triton.jit
def _add_up(partial_ptr, bias_ptr, y_ptr, count, N, SPLITS: tl.constexpr, BIAS: tl.constexpr, SIZE: tl.constexpr):
    """y = the sum of SPLITS partial results of `count` numbers, in order, plus the bias."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    there = at < count
    total = tl.zeros((SIZE,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * count + at, mask=there, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + at % N, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=there)


def decode24(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, *, processors: int, fast: bool, stages: int = 1
) -> Tensor:
    """x (tokens, columns) times Wᵀ, plus the bias, (tokens, rows), for at most `MOST` tokens.

    Args:
        values, meta: as in `reference.Packed`, 16-bit.
        processors: multiprocessors of the device.
        stages: of the pipeline that loads; two take 139 KiB of shared memory at most, one 17.
        fast: with PTX and tensor cores in 16 bits; else in float32, by means that Triton's interpreter knows.
    """
    x = x.contiguous()
    (tokens, columns), (rows, chunks, width) = x.shape, meta.shape
    blocks = triton.cdiv(rows, _ROWS)
    splits = max(min(triton.cdiv(_WAVES * processors, blocks), chunks), 1)
    each = triton.cdiv(chunks, splits)
    splits = triton.cdiv(chunks, each)
    partial = torch.empty(splits, tokens, rows, dtype=torch.float32, device=x.device)
    padded = next(size for size in (8, 16, 32) if size >= tokens)
    _decode[blocks, splits](
        values.view(torch.int32), meta, x, partial, tokens, rows, columns, chunks, each,
        ROWS=_ROWS, WORDS=width, TOKENS=padded, FAST=fast, num_warps=8, num_stages=stages,
    )  # fmt: skip
    y = torch.empty(tokens, rows, dtype=x.dtype if fast else torch.float32, device=x.device)  # the interpreter rounds wrongly
    size = 1024
    _add_up[(triton.cdiv(y.numel(), size),)](
        partial, y if bias is None else bias.to(y.dtype), y, y.numel(), rows, SPLITS=splits, BIAS=bias is not None, SIZE=size
    )
    return y.to(x.dtype)


assert PLANES == 8  # what the kernel's two halves of four groups stand for
