"""All that decides the result of a run: an unfinished one goes on only where it is the same."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmprune.data.windows import Texts
from llmprune.job.allocation import as_texts
from llmprune.job.flags import flag
from llmprune.job.job import Job
from llmprune.job.record import RunRecord, versions
from llmprune.models.checkpoint import Checkpoint

_PASSING = {"model", "output", "overwrite", "restart", "activations", "calibration", "eval_text", "push_to_hub"}


def fingerprint(job: Job, checkpoint: Checkpoint, texts: Texts, record: RunRecord) -> dict[str, Any]:
    """In terms that a message can show.

    Args:
        record: of the run's first step, just begun.
    """
    options = {flag(name): value for name, value in asdict(job.config).items() if name not in _PASSING}
    windows = {"calibration text": texts.calibration, "evaluation text": texts.evaluation}
    return {
        **options,
        **{f"version of {package}": version for package, version in versions().items()},
        **{what: text.digest() if text else None for what, text in windows.items()},
        "--allocation holds": as_texts(job.allocation) if job.allocation else None,
        "--scan holds": job.scan.digest() if job.scan else None,
        "model": checkpoint.fingerprint(),
        "compute": f"{record.compute['dtype']} on {record.compute['device']}",
        "processes": job.ranks.size,
    }
