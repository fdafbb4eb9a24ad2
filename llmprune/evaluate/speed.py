"""How long things take, side by side: two ways to do one thing are timed turn about, never one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_LEAST, _TURNS = 0.02, 5  # seconds that a turn takes at least; turns of each side
_COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes
Call = Callable[[], Any]


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(sides: Sequence[Call], device: torch.device, *, turns: int = _TURNS) -> list[float]:
    """Seconds of one call of each side: the median of several turns."""
    counts = [_calls(side, device) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(turns):
        for side, count, found in zip(sides, counts, seconds, strict=True):
            found.append(_timed(side, count, device))
    return [statistics.median(found) for found in seconds]


def _calls(side: Call, device: torch.device) -> int:
    """How many calls make a turn; the first one here warms up."""
    _timed(side, 1, device)
    return max(int(_LEAST / max(_timed(side, 1, device), 1e-7)), 1)


def _timed(side: Call, count: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        side()
    synchronize(device)
    return (time.perf_counter() - start) / count


def graphed(calls: Sequence[Call], device: torch.device) -> Call:
    """All calls in a row: on a GPU as one CUDA graph, so that launching them costs nothing."""

    def row() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return row
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # as torch asks: warm up on the side
        row()
        row()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        row()
    return graph.replay


def copies(nbytes: int, device: torch.device) -> int:
    """How many matrices of so many bytes are more than three times the device's cache, so that none is found in it."""
    if device.type != "cuda":
        return 1
    return 3 * torch.cuda.get_device_properties(device).L2_cache_size // max(nbytes, 1) + 1


def bytes_per_second(device: torch.device) -> float:
    """Of reading and writing memory, measured now by a large copy; both ways count."""
    source = torch.ones(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    (seconds,) = side_by_side([lambda: target.copy_(source)], device)
    return 2 * source.nbytes / seconds
