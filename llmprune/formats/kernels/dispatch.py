"""Which road a product with a packed matrix takes on this device: measured once, remembered.

Roads: `decode` (a kernel for few tokens), `decompress` (a kernel writes the dense matrix, then cuBLAS), `cusparselt` (the
sparse tensor cores, through torch) and, everywhere, `reference`. Each is checked against the reference before it may be
remembered; while a CUDA graph is captured nothing can be measured, and what is not known yet takes a Triton road.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.base.hardware import synchronize
from llmprune.base.version import __version__
from llmprune.formats.kernels import cusparselt, reference
from llmprune.formats.kernels.reference import Packed
from llmprune.formats.kernels.timing import copies, graphed

_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens; more are as the last
_TOLERANCE = 2e-2  # of the largest output: 16-bit outputs of float32 sums
_RUNS = 10
_TWO_STAGES = 160 * 1024  # bytes of shared memory
Road = Callable[[Tensor, Packed, "Tensor | None", "Tensor | None"], Tensor]


def linear24(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None = None) -> Tensor:
    """`x` (tokens, columns) times the packed matrix's transpose, plus the bias: (tokens, rows).

    Args:
        blob: the same matrix as cuSPARSELt wants it, if there is such a copy.
    """
    if x.device.type != "cuda" or packed.values.dtype.itemsize != 2 or not len(x) or not has_triton():
        return reference.linear24(x, packed, bias)
    with torch.cuda.device(x.device):  # Triton launches on the current one
        return _roads()[_choose(x, packed, blob)](x, packed, bias, blob)


def wants_blob(packed: Packed, blob: Tensor) -> bool:
    """Whether some number of tokens takes the road through cuSPARSELt, where there is a blob."""
    sizes = [size for size in _BUCKETS if size > _most()]
    x = _random(sizes[-1], packed)
    with torch.cuda.device(blob.device):
        return "cusparselt" in {_choose(x[:size], packed, blob) for size in sizes}


@cache
def has_triton() -> bool:
    """Whether Triton is there. Where a GPU is and Triton is not, that is said, once."""
    try:
        import triton  # noqa: F401
    except ImportError:
        if torch.cuda.is_available():
            warnings.warn("Triton is not installed: packed 2:4 layers run on slow paths (pip install triton)", stacklevel=2)
        return False
    return True


@cache
def _roads() -> dict[str, Road]:
    from llmprune.formats.kernels import decode, decompress

    def by_decode(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
        own = torch.cuda.get_device_properties(x.device)
        stages = 2 if getattr(own, "shared_memory_per_block_optin", 0) >= _TWO_STAGES else 1
        processors = own.multi_processor_count
        return decode.decode24(x, packed.values, packed.meta, bias, processors=processors, fast=True, stages=stages)

    def by_decompress(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
        dense = decompress.decompress24(packed.values, packed.meta, packed.columns, fast=True)
        return functional.linear(x, dense, bias)

    def by_cusparselt(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
        assert blob is not None
        return cusparselt.multiply(x, blob, bias)

    def by_reference(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
        return reference.linear24(x, packed, bias)

    return {"decode": by_decode, "decompress": by_decompress, "cusparselt": by_cusparselt, "reference": by_reference}


def _choose(x: Tensor, packed: Packed, blob: Tensor | None) -> str:
    bucket = min((size for size in _BUCKETS if size >= len(x)), default=_BUCKETS[-1])
    copies = "" if blob is None else " with blob"
    key = f"{len(packed.values)}x{packed.columns} {str(x.dtype).removeprefix('torch.')} {bucket}{copies}"
    table = _table(x.device)
    if key not in table:
        if torch.cuda.is_current_stream_capturing():  # nothing may be measured now
            return "decode" if len(x) <= _most() else "decompress"
        table[key] = _fastest(_random(bucket, packed).to(x.dtype), packed, blob)
        _remember(x.device, table)
    road = table[key]
    return "decompress" if road == "decode" and len(x) > _most() else road


def _most() -> int:
    from llmprune.formats.kernels.decode import MOST

    return MOST


def _random(tokens: int, packed: Packed) -> Tensor:
    """Inputs that leave the user's own random numbers as they are."""
    values = packed.values
    generator = torch.Generator(values.device).manual_seed(0)
    return torch.randn(tokens, packed.columns, generator=generator, device=values.device, dtype=values.dtype)


def _fastest(x: Tensor, packed: Packed, blob: Tensor | None) -> str:
    """The quickest road that gives the right result."""
    right = reference.linear24(x, packed, None).float()
    seconds = {}
    for name, road in _roads().items():
        if (name == "decode" and len(x) > _most()) or (name == "cusparselt" and blob is None):
            continue
        try:
            gap = float((road(x, packed, None, blob).float() - right).abs().max())
            if gap <= _TOLERANCE * float(right.abs().max()):
                seconds[name] = _measured(road, x, packed, blob)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001  Triton and CUDA raise what they like: such a road is not taken
            continue
    return min(seconds, key=lambda name: seconds[name], default="reference")


def _measured(road: Road, x: Tensor, packed: Packed, blob: Tensor | None) -> float:
    """Seconds of one call, in a CUDA graph over copies of the matrix; the least of several replays."""
    many = copies(packed.values.nbytes + packed.meta.nbytes, x.device)
    mats = [Packed(packed.values.clone(), packed.meta.clone(), packed.columns) for _ in range(many)]
    blobs = [None if blob is None else blob.clone() for _ in mats]
    replay = graphed([partial(road, x, own, None, twin) for own, twin in zip(mats, blobs, strict=True)], x.device)
    best = float("inf")
    for _ in range(_RUNS):
        synchronize(x.device)
        start = time.perf_counter()
        replay()
        synchronize(x.device)
        best = min(best, (time.perf_counter() - start) / many)
    return best


@cache
def _table(device: torch.device) -> dict[str, str]:
    """What was measured on such a device before, by these versions; shared by all that use it in this process."""
    try:
        found = json.loads(_file(device).read_text())
    except (OSError, ValueError, RuntimeError):
        return {}
    known = found.items() if isinstance(found, dict) else ()
    return {key: road for key, road in known if isinstance(road, str) and road in _roads()}


def _remember(device: torch.device, table: dict[str, str]) -> None:
    """Write the table, whole or not at all; a cache that cannot be written is no error."""
    try:
        path = _file(device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            json.dump(table, stream, indent=1, sort_keys=True)
        Path(stream.name).replace(path)
    except (OSError, RuntimeError):
        pass


def _file(device: torch.device) -> Path:
    import triton

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton.__version__} {__version__}"
    return root / "llmprune" / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"
