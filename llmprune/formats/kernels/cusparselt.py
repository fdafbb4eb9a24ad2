"""The sparse tensor cores through cuSPARSELt, where torch has it: for many tokens.

It wants a layout of its own, so a layer that takes this road holds a second, compressed copy (`blob`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SPARSE_CORES = (8, 0)  # devices from here on have them
_MULTIPLE_OF_SIDES, _MULTIPLE_OF_TOKENS = 16, 8  # for 16-bit numbers, as torch.sparse has them


def supported(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch, on this device, may take such a matrix this way."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _SPARSE_CORES:
        return False
    sides = rows % _MULTIPLE_OF_SIDES == 0 and columns % _MULTIPLE_OF_SIDES == 0
    return sides and dtype.itemsize == 2 and torch.backends.cusparselt.is_available()


def compress(dense: Tensor) -> Tensor:
    """The blob of a 2:4 matrix (rows, columns)."""
    return torch.ops.aten._cslt_compress(dense)


def multiply(x: Tensor, blob: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, columns) times the matrix's transpose, plus the bias: (tokens, rows)."""
    short = -len(x) % _MULTIPLE_OF_TOKENS
    padded = functional.pad(x, (0, 0, 0, short)) if short else x.contiguous()
    return torch.ops.aten._cslt_sparse_mm(blob, padded.t(), bias).t()[: len(x)].contiguous()
