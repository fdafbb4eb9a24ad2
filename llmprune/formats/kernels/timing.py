"""Calls timed as a GPU runs them: captured in a CUDA graph, on weights that are not in its cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_MOST, _CACHE = 64, 2**26  # copies; bytes
Call = Callable[[], Any]


def graphed(calls: Sequence[Call], device: torch.device) -> Call:
    """All calls in a row: on a GPU as one CUDA graph, so that launching them costs nothing."""

    def row() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return row
    with torch.cuda.device(device):
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


def graph_seconds(calls: Sequence[Call], device: torch.device, runs: int = 5) -> float:
    """Seconds of one of the calls, all captured in a row on a GPU: the least of several runs, by the device's clock."""
    replay = graphed(calls, device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(runs):
        replay()  # while it runs, the next is on its way
        before.record()
        replay()
        after.record()
        after.synchronize()
        best = min(best, before.elapsed_time(after))
    return best / 1000 / len(calls)


def eager_seconds(call: Call, device: torch.device, runs: int = 10) -> float:
    """Seconds of a call that is launched anew each time: what the host or the device takes, whichever is more."""
    call()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(runs):
        call()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / runs


def copies(nbytes: int, device: torch.device) -> int:
    """How many matrices of so many bytes are more than three times the device's cache, at most 64: few are found in it. Of a
    CPU's cache 64 MiB are taken to be this process's.
    """
    if device.type != "cuda":
        return min(3 * _CACHE // max(nbytes, 1) + 1, _MOST)
    return min(3 * torch.cuda.get_device_properties(device).L2_cache_size // max(nbytes, 1) + 1, _MOST)
