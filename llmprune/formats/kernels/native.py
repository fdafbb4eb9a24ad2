"""The products of `cpu/`, through ctypes: compiled when llmprune is installed, where there is a compiler."""

from __future__ import annotations

import ctypes
import importlib.machinery
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.formats.kernels.bitmask import CHUNK, Bitmask

BEST = -1
DTYPES = (torch.bfloat16, torch.float32)  # that are computed in
_FEW, _INPUTS = 32, 2**23  # tokens, and with matrix units numbers of inputs, up to which a matrix is not expanded in memory
LEVELS = ("portable", "AVX2", "AVX-512", "AMX")
_KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2, torch.uint8: 3}  # of what is stored
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


@cache
def library() -> ctypes.CDLL | None:
    """What was compiled; None where it was not, which is said once."""
    folder = Path(__file__).parent
    built = next((file for end in importlib.machinery.EXTENSION_SUFFIXES if (file := folder / f"_masked{end}").is_file()), None)
    try:
        found = ctypes.CDLL(str(built)) if built else None
    except OSError:
        found = None
    if found is None:
        warnings.warn(
            "llmprune's products for CPUs were not compiled, so sparse layers are slow: get g++, and install llmprune anew",
            stacklevel=2,
        )
        return None
    found.llmprune_multiply.argtypes = [*[_POINTER] * 7, *[_SIZE] * 7, _POINTER, _SIZE]
    found.llmprune_expand.argtypes = [*[_POINTER] * 5, *[_SIZE] * 6, _POINTER, _SIZE]
    found.llmprune_level.restype = _SIZE
    return found


def level() -> str:
    """What the best products here are made of."""
    found = library()
    return "none" if found is None else LEVELS[found.llmprune_level()]


@cache
def _parallel() -> int | None:
    """The address of OpenMP's entry for parallel regions in the runtime that torch has loaded: its threads are used, and no
    others. None where that is not to be found; then one thread works.
    """
    maps = Path("/proc/self/maps")
    loaded = set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\S*)", maps.read_text())) if maps.is_file() else set()
    for name in sorted(loaded, key=lambda name: ("torch" not in name, name)):
        try:
            entry: Any = ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, _POINTER).value
    return None


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are products for such a device and dtype."""
    return device.type == "cpu" and dtype in DTYPES and library() is not None


def able(packed: Bitmask, dtype: torch.dtype) -> bool:
    """Whether there is a product for such a matrix, and inputs of `dtype`."""
    held = packed.values.dtype if packed.scale is None else packed.scale.dtype
    return held == dtype and (packed.scale is None or _group(packed) % CHUNK == 0) and computes(packed.mask.device, dtype)


def most(dtype: torch.dtype, columns: int) -> int:
    """Tokens up to which `multiply` is to be taken; beyond, a dense product with the expanded matrix is quicker."""
    return max(_FEW, _INPUTS // columns) if dtype == torch.bfloat16 and level() == LEVELS[-1] else _FEW


def multiply(x: Tensor, packed: Bitmask, bias: Tensor | None, best: int = BEST) -> Tensor:
    """`x` (tokens, columns) times the matrix's transpose, plus the bias: (tokens, rows). At most `most` tokens.

    Args:
        best: the highest of `LEVELS` to use, by its number.
    """
    x, y = x.contiguous(), x.new_empty(len(x), packed.rows)
    own = [_address(tensor) for tensor in (packed.mask, packed.values, packed.starts, packed.scale, bias, x, y)]
    sizes = (packed.rows, packed.columns, _group(packed), len(x), _KINDS[packed.values.dtype], int(x.dtype == torch.bfloat16))
    _library().llmprune_multiply(*own, *sizes, best, _parallel(), torch.get_num_threads())
    return y


def expand(packed: Bitmask, best: int = BEST) -> Tensor:
    """The matrix (rows, columns)."""
    dtype = packed.values.dtype if packed.scale is None else packed.scale.dtype
    y = torch.empty(packed.rows, packed.columns, dtype=dtype)
    own = [_address(tensor) for tensor in (packed.mask, packed.values, packed.starts, packed.scale, y)]
    sizes = (packed.rows, packed.columns, _group(packed), _KINDS[packed.values.dtype], int(dtype == torch.bfloat16))
    _library().llmprune_expand(*own, *sizes, best, _parallel(), torch.get_num_threads())
    return y


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None  # `able` is asked first
    return found


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _group(packed: Bitmask) -> int:
    """Columns that share a scale; 0 where weights are stored."""
    return 0 if packed.scale is None else packed.columns // packed.scale.shape[1]
