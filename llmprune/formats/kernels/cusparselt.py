"""The sparse tensor cores through cuSPARSELt, where torch has it: for many tokens.

It wants a layout of its own, so a layer that takes this road holds a second, compressed copy (`blob`). Which of the library's
algorithms is quickest for a shape is searched once (`search`), and never while a CUDA graph is captured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SPARSE_CORES = (8, 0)  # devices from here on have them
_MULTIPLE_OF_SIDES, _MULTIPLE_OF_TOKENS = 16, 8  # for 16-bit numbers, as torch.sparse has them
_DEFAULT = 0  # an algorithm that every shape has
_LARGEST = 12  # a power of two, of tokens; an algorithm for so many serves more

Key = tuple[int, int, int, torch.dtype, torch.device]
_algorithms: dict[Key, int] = {}


def supported(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch, on this device, may take such a matrix this way."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _SPARSE_CORES:
        return False
    sides = rows % _MULTIPLE_OF_SIDES == 0 and columns % _MULTIPLE_OF_SIDES == 0
    return sides and dtype.itemsize == 2 and torch.backends.cusparselt.is_available()


def compress(dense: Tensor) -> Tensor:
    """The blob of a 2:4 matrix (rows, columns)."""
    return torch.ops.aten._cslt_compress(dense)


def search(x: Tensor, blob: Tensor) -> int:
    """The quickest algorithm for as many tokens as x has, to the next power of two: searched once, then remembered. Where the
    search fails it is the default one.
    """
    if (found := _algorithms.get(_key(x, blob))) is not None:
        return found
    try:
        found = int(torch.ops.aten._cslt_sparse_mm_search(blob, _padded(x).t(), transpose_result=True))
    except (RuntimeError, AttributeError):  # the latter: this torch has no search
        found = _DEFAULT
    _algorithms[_key(x, blob)] = found
    return found


def multiply(x: Tensor, blob: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, columns) times the matrix's transpose, plus the bias: (tokens, rows)."""
    algorithm = _algorithms.get(_key(x, blob), _DEFAULT)
    y = torch.ops.aten._cslt_sparse_mm(blob, _padded(x).t(), bias, transpose_result=True, alg_id=algorithm)
    return y[: len(x)]


def _key(x: Tensor, blob: Tensor) -> Key:
    return blob.numel(), x.shape[1], min((len(x) - 1).bit_length(), _LARGEST), x.dtype, x.device


def _padded(x: Tensor) -> Tensor:
    short = -len(x) % _MULTIPLE_OF_TOKENS
    return functional.pad(x, (0, 0, 0, short)) if short else x.contiguous()
