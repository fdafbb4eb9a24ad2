"""y = x Wᵀ for few tokens: W is read packed, expanded in registers and multiplied on tensor cores.

Few tokens mean that reading W decides, so every byte of it is read once. W stands where a product has its large side, and
the tokens, padded to 8, 16, 32 or 64, where it has its small one. W is cut into tiles (a block of rows, a chunk of columns).
Block after block they are dealt out, in equal runs, to as many programs as the device holds at once. Where several programs
share a block of rows, each stores its partial sum, and the last to arrive adds them all in their order, so that two runs give
the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.formats.kernels.arrivals import arrivals
from llmprune.formats.kernels.bits import expand, plane, planes
from llmprune.formats.kernels.plan import Settings, padded, plan
from llmprune.formats.kernels.reference import PLANES


@triton.jit
def _add_product(total, w, x_ptr, tokens, M, K, first, WIDTH: tl.constexpr, FAST: tl.constexpr):
    """`total` plus the product of w (rows, WIDTH) and the inputs of the columns from `first` on."""
    columns = first + tl.arange(0, WIDTH)
    mask = (tokens < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * K + columns[None, :], mask=mask, other=0.0)
    if FAST:
        return tl.dot(w, tl.trans(x), total)
    return total + tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), input_precision="ieee")


@triton.jit
def _sum_of_run(
    values_ptr, meta_ptr, x_ptr, rows, M, K, chunks, first, last,
    ROWS: tl.constexpr, WORDS: tl.constexpr, TOKENS: tl.constexpr, JOINED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The product (ROWS, TOKENS) of a block of rows over the chunks `first` to `last`. `values_ptr` has one element a group."""
    word, tokens = tl.arange(0, WORDS)[None, :], tl.arange(0, TOKENS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    meta_at = meta_ptr + rows[:, None] * (chunks * WORDS) + word
    values_at = values_ptr + rows[:, None] * (chunks * 8 * WORDS) + word
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for chunk in range(first, last):
        meta = tl.load(meta_at + chunk * WORDS)
        for half in tl.static_range(2):
            group = (chunk * 8 + half * 4) * WORDS
            v0 = tl.load(values_at + group)
            v1 = tl.load(values_at + group + WORDS)
            v2 = tl.load(values_at + group + 2 * WORDS)
            v3 = tl.load(values_at + group + 3 * WORDS)
            a0, b0, a1, b1, a2, b2, a3, b3 = expand(meta >> (16 * half), v0, v1, v2, v3, FAST)
            column = 4 * group
            if JOINED:
                w = planes(a0, b0, a1, b1, a2, b2, a3, b3, ROWS, WORDS, dtype)
                total = _add_product(total, w, x_ptr, tokens, M, K, column, 16 * WORDS, FAST)
            else:
                w = plane(a0, b0, ROWS, WORDS, dtype)
                total = _add_product(total, w, x_ptr, tokens, M, K, column, 4 * WORDS, FAST)
                w = plane(a1, b1, ROWS, WORDS, dtype)
                total = _add_product(total, w, x_ptr, tokens, M, K, column + 4 * WORDS, 4 * WORDS, FAST)
                w = plane(a2, b2, ROWS, WORDS, dtype)
                total = _add_product(total, w, x_ptr, tokens, M, K, column + 8 * WORDS, 4 * WORDS, FAST)
                w = plane(a3, b3, ROWS, WORDS, dtype)
                total = _add_product(total, w, x_ptr, tokens, M, K, column + 12 * WORDS, 4 * WORDS, FAST)
    return total


@triton.jit
def _store(y_ptr, bias_ptr, total, rows, tokens, M, N, BIAS: tl.constexpr):
    """y = total plus the bias."""
    if BIAS:
        total += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    at = y_ptr + tokens[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < M)[None, :])


@triton.jit(do_not_specialize=["M", "N", "chunks", "each"])
def _decode(
    values_ptr, meta_ptr, x_ptr, bias_ptr, y_ptr, partial_ptr, arrived_ptr, M, N, K, chunks, each,
    ROWS: tl.constexpr, WORDS: tl.constexpr, TOKENS: tl.constexpr, JOINED: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """`partial_ptr` has two places a program, (TOKENS, ROWS) of float32: for a block of rows that another began, and for one
    that another ends. `arrived_ptr` has a zero for each block, and a zero again in the end.
    """
    program = tl.program_id(0)
    start = program * each
    end = min(start + each, tl.cdiv(N, ROWS) * chunks)
    row, tokens = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    place = tokens[None, :] * ROWS + row[:, None]
    used = (tokens < M)[None, :]
    for block in range(start // chunks, tl.cdiv(end, chunks)):
        rows = block * ROWS + row
        there = tl.minimum(rows, N - 1).to(tl.int64)  # rows past the end repeat the last one, and are not stored
        first, last = max(start - block * chunks, 0), min(end - block * chunks, chunks)
        total = _sum_of_run(
            values_ptr, meta_ptr, x_ptr, there, M, K, chunks, first, last, ROWS, WORDS, TOKENS, JOINED, FAST
        )  # fmt: skip
        if last - first == chunks:
            _store(y_ptr, bias_ptr, total, rows, tokens, M, N, BIAS)
        else:
            begins = (block * chunks) // each  # the first and the last program that share this block
            ends = (block * chunks + chunks - 1) // each
            own = 2 * program + (program == begins).to(tl.int32)
            tl.store(partial_ptr + own.to(tl.int64) * (ROWS * TOKENS) + place, total, mask=used)
            tl.debug_barrier()  # all threads have stored before one of them tells it to the other programs
            before = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel", scope="gpu")
            if before == ends - begins:
                total = tl.zeros((ROWS, TOKENS), tl.float32)
                for other in range(begins, ends + 1):
                    at = 2 * other + (other == begins).to(tl.int32)
                    # .cg: past the first-level cache, which does not hear of other programs' stores
                    total += tl.load(
                        partial_ptr + at.to(tl.int64) * (ROWS * TOKENS) + place, mask=used, other=0.0, cache_modifier=".cg"
                    )
                _store(y_ptr, bias_ptr, total, rows, tokens, M, N, BIAS)
                tl.store(arrived_ptr + block, 0)


def decode24(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, *,
    processors: int, shared: int, fast: bool = True, settings: Settings | None = None,
) -> Tensor:  # fmt: skip
    """x (tokens, columns) times Wᵀ, plus the bias, (tokens, rows), for at most `plan.MOST` tokens.

    Args:
        values, meta: as in `reference.Packed`, 16-bit.
        processors: multiprocessors of the device; `shared`: bytes of shared memory that one program may have there.
        fast: with PTX and tensor cores in 16 bits; else in float32, by means that Triton's interpreter knows.
        settings: of the kernel; else as `plan.plan` has them.
    """
    x = x.contiguous()
    (tokens, columns), (rows, chunks, width) = x.shape, meta.shape
    own = plan(rows, chunks, width, tokens, processors, shared, settings)
    size = padded(tokens)
    y = torch.empty(tokens, rows, dtype=x.dtype if fast else torch.float32, device=x.device)  # the interpreter rounds wrongly
    places = own.programs * 2 * own.settings.rows * size if own.shares else 0
    partial = torch.empty(places, dtype=torch.float32, device=x.device)
    arrived = arrivals(x.device, own.blocks) if own.shares else meta  # not touched
    _decode[(own.programs,)](
        values.view(torch.int32), meta, x, y if bias is None else bias, y, partial, arrived,
        tokens, rows, columns, chunks, own.each,
        ROWS=own.settings.rows, WORDS=width, TOKENS=size, JOINED=own.settings.joined, BIAS=bias is not None, FAST=fast,
        num_warps=own.settings.warps, num_stages=own.settings.stages,
    )  # fmt: skip
    return y.to(x.dtype)


assert PLANES == 8  # what the kernel's two halves of four groups stand for
