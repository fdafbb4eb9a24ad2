"""Which road a product with a packed matrix takes on this device: measured once a shape, remembered.

`Sparse24Linear.prepare` measures all numbers of tokens of a shape before anything is captured in a CUDA graph. What is met
unprepared is measured when it is met; where a graph is captured, and nothing can be measured, it takes a Triton road. Each road
is checked against the reference before it may be taken.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmprune.base.cache import cache_file, recall, remember
from llmprune.base.version import __version__
from llmprune.formats.kernels import cusparselt, reference
from llmprune.formats.kernels.arrivals import arena
from llmprune.formats.kernels.plan import MOST
from llmprune.formats.kernels.reference import Packed

if TYPE_CHECKING:
    from llmprune.formats.kernels.roads import Trial

_LARGEST = 4096  # tokens; more are as so many
_BUCKETS = tuple(2**i for i in range(_LARGEST.bit_length()))
_NAME = re.compile(r"(\d+) (\d+) (bfloat16|float16) (\d+)")  # of an entry on disk
_NAMES = ("gemv", "decode", "decompress", "cusparselt", "reference")

Key = tuple[int, int, torch.dtype, int]  # rows, columns, dtype, bucket of tokens
Measured = dict[str, "float | str"]  # by road: seconds, or why there are none
_chosen: dict[tuple[torch.device, int, int, torch.dtype, bool, int], str] = {}  # a road; the bool: whether there is a blob


def linear24(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None = None) -> Tensor:
    """`x` (tokens, columns) times the packed matrix's transpose, plus the bias: (tokens, rows).

    Args:
        blob: the same matrix as cuSPARSELt wants it, if there is such a copy.
    """
    if not len(x) or x.dtype != packed.values.dtype or not _measurable(packed):
        return reference.linear24(x, packed, bias)
    from llmprune.formats.kernels.roads import ROADS

    with _on(x.device):
        return ROADS[_choose(len(x), packed, blob)](x, packed, bias, blob)


def prepare(packed: Packed) -> Tensor | None:
    """Measure what is not known yet of such a matrix, for all numbers of tokens, and make what its launches need.

    Returns:
        The copy for cuSPARSELt, if that is the quickest road for some number of tokens.
    """
    if not _measurable(packed):
        return None
    device = packed.values.device
    with _on(device):
        arena(device)
        table = _table(device)
        known = all(_key(packed, bucket) in table for bucket in _BUCKETS)
        if known and not _taken_by_cusparselt(packed):
            return None
        blob = _blob(packed)
        _measure(packed, blob, _BUCKETS)
        wanted = _taken_by_cusparselt(packed)
        if blob is None or not wanted:
            return None
        trial = _trial(packed, blob, max(wanted))
        for bucket in wanted:
            cusparselt.search(trial.x[:bucket], blob)
        return blob


def roads_measured(packed: Packed, tokens: int, blob: Tensor | None = None) -> Measured:
    """Every road that can be tried, with the seconds of one product of so many tokens, or why it failed.

    Args:
        blob: without it, cuSPARSELt is listed only where it was measured before.
    """
    with _on(packed.values.device):
        return dict(_measure(packed, blob, [_bucket(tokens)]))


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


def _measurable(packed: Packed) -> bool:
    return packed.values.is_cuda and packed.values.dtype.itemsize == 2 and has_triton()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _bucket(tokens: int) -> int:
    """The next power of two."""
    return min(1 << (tokens - 1).bit_length(), _LARGEST)


def _key(packed: Packed, bucket: int) -> Key:
    return len(packed.values), packed.columns, packed.values.dtype, bucket


def _choose(tokens: int, packed: Packed, blob: Tensor | None) -> str:
    values, bucket = packed.values, _bucket(tokens)
    key = (values.device, len(values), packed.columns, values.dtype, blob is not None, bucket)
    if (road := _chosen.get(key)) is None:
        if torch.cuda.is_current_stream_capturing():  # nothing may be measured now
            return "decode" if tokens <= MOST else "decompress"
        road = _chosen[key] = quickest(_measure(packed, blob, [bucket]), blob is not None)
    return road


def quickest(measured: Measured, blob: bool) -> str:
    """The road to take, where there is a copy for cuSPARSELt or none."""
    seconds = {
        name: own for name, own in measured.items() if isinstance(own, float) and (blob or name != "cusparselt")
    }  # fmt: skip
    return min(seconds, key=lambda name: seconds[name], default="reference")


def _taken_by_cusparselt(packed: Packed) -> list[int]:
    """The buckets for which that is the quickest road."""
    table = _table(packed.values.device)
    return [b for b in _BUCKETS if quickest(table.get(_key(packed, b), {}), blob=True) == "cusparselt"]


def _blob(packed: Packed) -> Tensor | None:
    values = packed.values
    if not cusparselt.supported(len(values), packed.columns, values.dtype, values.device):
        return None
    try:
        return cusparselt.compress(reference.unpack(packed))
    except RuntimeError:  # this cuSPARSELt does not drive this device
        return None


def _trial(packed: Packed, blob: Tensor | None, most: int) -> Trial:
    from llmprune.formats.kernels.roads import Trial

    return Trial(packed, blob, most)


def _measure(packed: Packed, blob: Tensor | None, buckets: Iterable[int]) -> Measured:
    """Every road for such numbers of tokens, where that is not known; what is known of the last number."""
    table, buckets = _table(packed.values.device), list(buckets)
    trial = _trial(packed, blob, max(buckets))
    news = False
    for bucket in buckets:
        found = table.setdefault(_key(packed, bucket), {})
        for name in trial.roads(bucket):
            if name not in found:
                found[name], news = trial.seconds(name, bucket), True
    if news:
        del trial
        torch.cuda.empty_cache()  # what graphs and copies took
        _remember(packed.values.device, table)
    return found


@cache
def _table(device: torch.device) -> dict[Key, Measured]:
    """What was measured on such a device before, by these versions; shared by all that use it in this process."""
    found: dict[Key, Measured] = {}
    for name, entry in recall(_file(device)).items():
        if (own := _NAME.fullmatch(name)) and isinstance(entry, dict):
            key = int(own[1]), int(own[2]), getattr(torch, own[3]), int(own[4])
            found[key] = {road: time for road, time in entry.items() if road in _NAMES and isinstance(time, float | str)}
    return found


def _remember(device: torch.device, table: dict[Key, Measured]) -> None:
    stored = {f"{n} {k} {str(kind).removeprefix('torch.')} {b}": own for (n, k, kind, b), own in table.items()}
    remember(_file(device), stored)


def _file(device: torch.device) -> Path | None:
    import triton

    return cache_file(
        f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton.__version__} {__version__}"
    )
