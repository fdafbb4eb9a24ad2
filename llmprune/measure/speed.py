"""How long things take, side by side: two ways to do one thing are timed turn about, never one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from llmprune.base.hardware import synchronize
from llmprune.formats.kernels.timing import Call

_LEAST, _TURNS = 0.02, 5  # seconds that a turn takes at least; turns of each side
_COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes


def side_by_side(
    sides: Sequence[Call],
    device: torch.device,
    *,
    turns: int = _TURNS,
    of_turns: Callable[[Sequence[float]], float] = statistics.median,
) -> list[float]:
    """Seconds of one call of each side: the median of several turns, or what else is to be taken `of_turns`."""
    counts = [_calls(side, device) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(turns):
        for side, count, found in zip(sides, counts, seconds, strict=True):
            found.append(_timed(side, count, device))
    return [of_turns(found) for found in seconds]


def seconds_of(side: Call, device: torch.device) -> float:
    """Seconds of one call, after one that warms up."""
    _timed(side, 1, device)
    return max(_timed(side, 1, device), 1e-7)


def _calls(side: Call, device: torch.device) -> int:
    """How many calls make a turn."""
    return max(int(_LEAST / seconds_of(side, device)), 1)


def _timed(side: Call, count: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        side()
    synchronize(device)
    return (time.perf_counter() - start) / count


def bytes_per_second(device: torch.device) -> float:
    """Of reading and writing memory, measured now by a large copy; both ways count."""
    source = torch.ones(_COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    (seconds,) = side_by_side([lambda: target.copy_(source)], device)
    return 2 * source.nbytes / seconds
