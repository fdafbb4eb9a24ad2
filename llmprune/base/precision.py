"""Products of float32 matrices in all of float32, whatever the user allows models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it products of float32 tensors are computed in float32, not in TF32 or bfloat16. Also a decorator.

    A user may have allowed those by `torch.set_float32_matmul_precision`, `allow_tf32` or `fp32_precision`, the last for all of
    torch or for one backend: what was set is put back. The settings are the process's.
    """
    backends = [backend for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if backend]
    backends = [backend for backend in backends if hasattr(backend, "fp32_precision")]  # torch 2.9
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"  # torch refuses to tell its older setting beside a newer one that contradicts it
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, value in zip(backends, before, strict=True):
            _put_back(backend, value)


def _put_back(backend: Any, value: str) -> None:
    """`value` may be that of all of torch, and then goes on following it."""
    backend.fp32_precision = "none"
    if backend.fp32_precision != value:
        backend.fp32_precision = value
