"""`torch.ops.llmprune.linear24`: the product as one operation that torch.compile and CUDA graphs see whole."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.formats.kernels import dispatch
from llmprune.formats.kernels.reference import Packed


def product(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, blob: Tensor | None, columns: int) -> Tensor:
    """`linear24`, as an operation only where that is needed, as calling one costs more than a small product."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):  # operations refuse to be differentiated
        return linear24(x, values, meta, bias, blob, columns)
    return _product(x, values, meta, bias, blob, columns)


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
