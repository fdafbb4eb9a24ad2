"""What a run writes down about itself."""

from __future__ import annotations

from llmprune.job.record import RunRecord


def test_overhead_is_a_multiple_of_the_forwards() -> None:
    record = RunRecord({}, {}, {}, {}, {}, seconds={"forward": 2.0, "statistics": 1.0, "solve": 1.0, "evaluate": 9.0})
    assert record.overhead() == 2.0
    assert RunRecord({}, {}, {}, {}, {}).overhead() is None
