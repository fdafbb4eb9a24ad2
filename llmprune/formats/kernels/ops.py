"""Products with packed matrices as operations, `torch.ops.llmprune.*`, that torch.compile and CUDA graphs see whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.formats.kernels import dispatch, native
from llmprune.formats.kernels.bitmask import Bitmask
from llmprune.formats.kernels.reference import Packed

_LARGE = 2**22  # weights that are expanded at once for many tokens


def product(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, blob: Tensor | None, columns: int) -> Tensor:
    """`linear24`, as an operation only where that is needed, as calling one costs more than a small product."""
    if _as_operation(x):
        return linear24(x, values, meta, bias, blob, columns)
    return _product(x, values, meta, bias, blob, columns)


def _as_operation(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())  # which operations refuse


def _product(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, blob: Tensor | None, columns: int) -> Tensor:
    y = dispatch.linear24(x.reshape(-1, columns), Packed(values, meta, columns), bias, blob)
    return y.contiguous().view(*x.shape[:-1], len(values))


@torch.library.custom_op("llmprune::linear24", mutates_args=())
def linear24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, blob: Tensor | None, columns: int) -> Tensor:
    """`x` (..., columns) times the transpose of the packed matrix (rows, columns), plus the bias: (..., rows)."""
    return _product(x, values, meta, bias, blob, columns)


@linear24.register_fake
def _(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, blob: Tensor | None, columns: int) -> Tensor:
    torch._check(x.shape[-1] == columns, lambda: f"inputs of {x.shape[-1]} columns for a matrix of {columns}")
    return x.new_empty(*x.shape[:-1], values.shape[0])


def masked_product(x: Tensor, packed: Bitmask, bias: Tensor | None) -> Tensor:
    """`masked_linear`, as an operation only where that is needed."""
    if not _as_operation(x):
        return _masked_product(x, packed, bias)
    parts = (packed.mask, packed.values, packed.starts, packed.scale)
    return masked_linear(x, *parts, bias, packed.rows, packed.columns)


def _masked_product(x: Tensor, packed: Bitmask, bias: Tensor | None) -> Tensor:
    rows, columns = packed.rows, packed.columns
    compiled = native.able(packed, x.dtype)
    if compiled and 0 < x.numel() <= native.most(x.dtype, columns) * columns:
        return native.multiply(x.reshape(-1, columns), packed, bias).view(*x.shape[:-1], rows)
    if compiled:
        found = torch.cat([functional.linear(x, native.expand(part)) for part in packed.parts(_LARGE)], dim=-1)
    else:
        found = torch.cat([functional.linear(x, part.weight()) for part in packed.parts()], dim=-1)
    return found if bias is None else found + bias


@torch.library.custom_op("llmprune::masked_linear", mutates_args=())
def masked_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    """`x` (..., columns) times the transpose of the matrix (rows, columns) of a `Bitmask`, plus the bias: (..., rows)."""
    return _masked_product(x, Bitmask(mask, values, starts, scale, rows, columns), bias)


@masked_linear.register_fake
def _(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    starts: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    columns: int,
) -> Tensor:
    torch._check(x.shape[-1] == columns, lambda: f"inputs of {x.shape[-1]} columns for a matrix of {columns}")
    return x.new_empty(*x.shape[:-1], rows)
