"""Counters for kernels whose last program to arrive does something for all: zeros that every launch leaves as zeros.

Launches that may run at the same time must not share counters. Launches of one stream follow each other, so each stream has its own;
a launch that is captured in a CUDA graph may be replayed on any stream, so each has its own too. All are parts of one tensor a
device, made before anything is captured (`arena`): what is first made while a graph is recorded would be in the graph's memory.
"""

from __future__ import annotations

from functools import cache
from threading import Lock

import torch
from torch import Tensor

_SIZE = 2**21  # counters a device, 8 MiB: some 90 graphs of an 8B Llama
_STREAM = 2**13  # of a stream
_lock = Lock()
_used: dict[torch.device, int] = {}
_streams: dict[tuple[torch.device, int], Tensor] = {}


@cache
def arena(device: torch.device) -> Tensor:
    """The counters of a device."""
    return torch.zeros(_SIZE, dtype=torch.int32, device=device)


def arrivals(device: torch.device, number: int) -> Tensor:
    """So many zeros for the next launch on the current stream. Where there are none left they are made anew, which takes time."""
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        found = _take(device, number)
    else:
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        found = _streams.get(key)
        if found is None and (found := _take(device, _STREAM)) is not None:
            _streams[key] = found
    return found if found is not None and len(found) >= number else torch.zeros(number, dtype=torch.int32, device=device)


def _take(device: torch.device, number: int) -> Tensor | None:
    """A part of the arena that nobody has."""
    with _lock:
        start = _used.get(device, 0)
        if start + number > _SIZE:
            return None
        _used[device] = start + number
    return arena(device)[start : start + number]
