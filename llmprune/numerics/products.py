"""Products of float32 copies of bfloat16 tensors on a CPU, by its bfloat16 instructions."""

from __future__ import annotations

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
