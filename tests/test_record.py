"""What a run writes down about itself."""

from __future__ import annotations

import time

import pytest

from llmprune.report.record import Clock, RunRecord


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


def test_overhead_is_a_multiple_of_the_forwards() -> None:
    record = RunRecord({}, {}, {}, {}, {}, seconds={"forward": 2.0, "statistics": 1.0, "solve": 1.0, "evaluate": 9.0})
    assert record.overhead() == 2.0
    assert RunRecord({}, {}, {}, {}, {}).overhead() is None
