"""Time and memory go to the phase in which they were spent."""

from __future__ import annotations

import time

import pytest
import torch

from llmprune.base import clock as module
from llmprune.base.clock import Clock

MIB = 2**20


def test_a_phase_within_another_counts_once() -> None:
    clock = Clock()
    start = time.perf_counter()
    with clock("forward"):
        time.sleep(0.02)
        for _ in range(2):
            with clock("statistics"):
                time.sleep(0.03)
    whole = time.perf_counter() - start
    assert sum(clock.seconds.values()) == pytest.approx(whole, rel=0.05)
    assert clock.seconds["statistics"] >= 0.06
    assert 0.02 <= clock.seconds["forward"] < 0.06
    clock.add({"forward": 5.0, "earlier": 1.0})
    assert (clock.seconds["forward"] > 5.0, clock.seconds["earlier"]) == (True, 1.0)


def test_a_peak_belongs_to_the_phase_that_held_it() -> None:
    with Clock() as clock:
        with clock("before"):
            pass
        with clock("during"):
            large = torch.ones(256 * MIB // 4)
            time.sleep(0.1)
            del large
        with clock("after"):
            pass
    before, during, after = (clock.memory[phase]["process"] for phase in ("before", "during", "after"))
    assert during > before + 200 * MIB
    assert during > after + 200 * MIB
    assert set(clock.peaks()) == {"process"}
    assert clock.peaks()["process"] > 0.98 * during


def test_a_gpu_has_done_the_work_of_a_phase_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product is done when the device is waited for, not when the call returns."""
    pending: list[float] = []

    def wait(device: torch.device) -> None:
        assert device.type == "cuda"
        while pending:
            time.sleep(pending.pop())

    monkeypatch.setattr(module, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    clock = Clock()
    clock.device = torch.device("cuda")
    with clock("forward"):
        pending.append(0.05)
        with clock("statistics"):
            pending.append(0.02)
        pending.append(0.03)
    with clock("solve"):
        pass
    assert clock.seconds["forward"] >= 0.08
    assert 0.02 <= clock.seconds["statistics"] < 0.05
    assert clock.seconds["solve"] < 0.02
