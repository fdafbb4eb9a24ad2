"""The last files of an output folder: the model card, and the record with the sums of all others."""

from __future__ import annotations

from pathlib import Path

from llmprune.base.files import RECORD, sums, write_json
from llmprune.job.record import RunRecord
from llmprune.models.checkpoint import Checkpoint
from llmprune.output.card import model_card
from llmprune.output.resume import MANIFEST


def write_record(folder: Path, record: RunRecord, name: str) -> None:
    """Add the model card, and last the record with the sums of all other files. The card names the repository, if any."""
    (folder / "README.md").write_text(model_card(record, record.arguments["push_to_hub"] or name), encoding="utf-8")
    record.size["bytes_after"] = Checkpoint(folder).nbytes()
    record.files = sums(folder, MANIFEST)
    write_json(folder / RECORD, record.as_dict())
