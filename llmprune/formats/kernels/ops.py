"""`torch.ops.llmprune.linear24`: the product as one operation that torch.compile and CUDA graphs see whole."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.formats.kernels import dispatch
from llmprune.formats.kernels.reference import Packed


@torch.library.custom_op("llmprune::linear24", mutates_args=())
def linear24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, blob: Tensor | None, columns: int) -> Tensor:
    """`x` (..., columns) times the transpose of the packed matrix (rows, columns), plus the bias: (..., rows)."""
    y = dispatch.linear24(x.reshape(-1, columns), Packed(values, meta, columns), bias, blob)
    return y.contiguous().view(*x.shape[:-1], len(values))


@linear24.register_fake
def _(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, blob: Tensor | None, columns: int) -> Tensor:
    torch._check(x.shape[-1] == columns, lambda: f"inputs of {x.shape[-1]} columns for a matrix of {columns}")
    return x.new_empty(*x.shape[:-1], values.shape[0])
