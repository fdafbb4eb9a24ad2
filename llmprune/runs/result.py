"""What a run returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from llmprune.job.record import RunRecord


@dataclass(frozen=True, slots=True)
class Result:
    """What `prune` and `recover` return.

    Attributes:
        record: what was asked, measured and written.
        model: the pruned model; None where it was streamed from one folder to another.
        output: the folder written, if any.
    """

    record: RunRecord
    model: PreTrainedModel | None
    output: Path | None
