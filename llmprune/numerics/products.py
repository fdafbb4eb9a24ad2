"""Products of 16-bit tensors that are summed in float32: by a GPU's own instructions for them, or of float32 copies, by a
CPU's bfloat16 instructions where it has such."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def bfloat16_products(*operands: Tensor) -> Iterator[None]:
    """Within it products of float32 tensors may round their factors to bfloat16, and sum in float32, if all `operands` are
    bfloat16 and on a CPU; float32 copies of those lose nothing by it.

    It is twice as fast where the CPU has such instructions. torch asks oneDNN, which then may round but need not
    (`fpmath_mode`), from AVX-512 on, and elsewhere computes in float32 as ever; so does a torch that has no such setting.
    The setting is the process's, and put back afterwards.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not all(one.dtype == torch.bfloat16 and one.device.type == "cpu" for one in operands):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add aᵀb to `total`, float32; `a` and `b` are as `factor` gives them."""
    if a.dtype == b.dtype != torch.float32:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float().T, b.float())


def factor(x: Tensor) -> Tensor:
    """`x` itself where its device sums products of its dtype in float32, else in float32."""
    return x if x.dtype in (torch.bfloat16, torch.float16) and _sums_in_float32(x.device, x.dtype) else x.float()


@functools.cache
def _sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can sum products of the 16-bit `dtype` in float32 on `device`: on a GPU, from 2.8 on; tried once."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones.T, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
