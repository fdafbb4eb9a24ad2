"""Counters for kernels whose last program to arrive does something for all: zeros that every launch leaves as zeros.

Launches that may run at the same time must not share counters. Launches of one stream follow each other, so each stream has
its own; a launch that is captured in a CUDA graph may be replayed on any stream, so each has its own too. All are parts of one
tensor a device (`arena`), made before anything is captured: what is made while a graph is recorded is in the graph's memory.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

_SIZE = 2**22  # counters a device, 16 MiB: enough for some 90 graphs of an 8B Llama
_STREAM = 2**13  # of a stream
_ALIGNED = 4  # counters, 16 bytes: Triton compiles a kernel anew for pointers that are not
_lock = Lock()
_arenas: dict[torch.device, Tensor] = {}
_used: dict[torch.device, int] = {}
_streams: dict[tuple[torch.device, int], Tensor] = {}


def arena(device: torch.device) -> Tensor:
    """The counters of a device, made at the first call."""
    with _lock:
        if device not in _arenas:
            _arenas[device] = torch.zeros(_SIZE, dtype=torch.int32, device=device)
            torch.cuda.current_stream(device).synchronize()  # other streams will read these zeros
        return _arenas[device]


def arrivals(device: torch.device, number: int) -> Tensor:
    """So many zeros for the next launch on the current stream: parts of the arena, or, where there is none left, new ones."""
    found = _own(device, number) if device.type == "cuda" else None
    return torch.zeros(number, dtype=torch.int32, device=device) if found is None else found


def _own(device: torch.device, number: int) -> Tensor | None:
    if torch.cuda.is_current_stream_capturing():
        return _take(device, number) if device in _arenas else None
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _streams:
        if (new := _take(device, _STREAM)) is None:
            return None
        _streams[key] = new
    return _streams[key] if number <= _STREAM else None


def _take(device: torch.device, number: int) -> Tensor | None:
    """A part of the arena that nobody has."""
    whole = arena(device)
    with _lock:
        start = _used.get(device, 0)
        if start + number > len(whole):
            return None
        _used[device] = start + -(-number // _ALIGNED) * _ALIGNED
    return whole[start : start + number]
