"""How long each phase of a run took, and how much memory it held at most."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch

from llmprune.base.hardware import peak_memory, synchronize

_EVERY = 0.02  # seconds between two looks at the resident memory


class Clock:
    """Adds up wall seconds by phase and keeps each one's highest memory; a phase within another counts for the inner one only.

    Within `with clock:` a thread looks at this process's resident memory every 20 ms, so that a shorter peak may be missed. Of
    what torch allocates on a GPU the peak is torch's own count, which is restarted with each phase. A phase ends when the GPU
    has done what it was told in it: some hundred waits a block, of some 50 us each.

    Attributes:
        seconds: by phase.
        memory: bytes by phase: of the `process` and, with a GPU, the `device`.
        device: where the run computes.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, dict[str, int]] = {}
        self.device = torch.device("cpu")
        self._open: list[str] = []
        self._process = psutil.Process()
        self._since, self._resident, self._device = 0.0, 0, 0
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> Clock:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._turn()
        self._open.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what an earlier run took as well."""
        self.seconds |= {phase: self.seconds.get(phase, 0.0) + more for phase, more in seconds.items()}

    def peaks(self) -> dict[str, int]:
        """The highest so far, of all phases: resident in this `process`, and allocated by torch on the `device`."""
        self._turn()
        return {"process": peak_memory()} | ({"device": self._device} if self.device.type == "cuda" else {})

    def _turn(self) -> None:
        """What passed since the last turn belongs to the innermost open phase."""
        synchronize(self.device)
        now, peak = time.perf_counter(), {"process": self._restart(self._process.memory_info().rss)}
        if self.device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._device = max(self._device, peak["device"])
        if self._open:
            phase = self._open[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
            known = self.memory.setdefault(phase, {})
            known.update({place: max(known.get(place, 0), value) for place, value in peak.items()})
        self._since = now

    def _restart(self, now: int) -> int:
        """The highest resident memory since this was last called."""
        with self._lock:
            highest, self._resident = max(self._resident, now), now
        return highest

    def _look(self) -> None:
        while not self._ended.wait(_EVERY):
            with self._lock:
                self._resident = max(self._resident, self._process.memory_info().rss)
