"""What a piece measures, row by row: each guarded and on disk at once, so that a piece goes on where it stopped."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.base.hardware import synchronize

Found = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to measure. `work` returns what it found; `right`, where there, says whether that is as it must be."""

    key: str
    work: Callable[[], Found]


class DeviceLost(Exception):
    """The device answers no more in this process: another process can go on."""


class Results:
    """The rows of one piece in one file.

    Args:
        header: device and versions; a file with another header is of another machine and is refused.
        end: of `time.monotonic()`, after which no row is begun.
        retry: measure again what failed before.
    """

    def __init__(self, path: Path, header: Found, device: torch.device, *, end: float, retry: bool) -> None:
        self._path, self._device, self._end = path, device, end
        self.rows: dict[str, Found] = {}
        self.left: list[str] = []
        self._header = header
        if path.exists():
            found = json.loads(path.read_text())
            if (found["device"], found["versions"]) != (header["device"], header["versions"]):
                raise SystemExit(f"{path} is of another device or other versions: name another --output")
            self.rows = {key: row for key, row in found["rows"].items() if not (retry and failed(row))}

    def measure(self, rows: Sequence[Row]) -> None:
        """Raises: DeviceLost: a row left the device unusable; it is on disk as failed."""
        for row in rows:
            if row.key in self.rows:
                continue
            if time.monotonic() > self._end:
                self.left.append(row.key)
                continue
            self._one(row)

    def _one(self, row: Row) -> None:
        cuda, start = self._device.type == "cuda", time.perf_counter()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            found = row.work()
            synchronize(self._device)
        except Exception as error:  # noqa: BLE001  whatever a compiler, a driver or a library says is a result here
            found = {"raised": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        found["row_seconds"] = round(time.perf_counter() - start, 2)
        if cuda and "raised" not in found:
            found["row_memory"] = torch.cuda.max_memory_allocated(self._device)
        self.rows[row.key] = found
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._header | {"rows": self.rows}, indent=1) + "\n")
        print(f"{'FAILED ' if failed(found) else ''}{row.key}: {json.dumps(found)[:300]}", flush=True)
        self._clean()

    def _clean(self) -> None:
        gc.collect()
        if self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from None


def failed(row: Found) -> bool:
    return "raised" in row or row.get("right") is False
