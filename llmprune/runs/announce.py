"""The beginning: the output folder is claimed, a step's record is begun, and said what is about to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmprune.base.folders import check_output, recover
from llmprune.base.hardware import dtype_name
from llmprune.base.words import count
from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.models.resolve import EXAMPLE, ModelFolder
from llmprune.output.card import licence
from llmprune.steps.base import Work


def claim_output(job: Job, output: Path, model: Path | None) -> None:
    """Refuse an output folder that would cost the user something, after the first process has put it right."""
    if job.ranks.first:
        recover(output)
    job.ranks.agree(None)
    check_output(output, model, job.config.overwrite)


def announce(
    job: Job,
    work: Work,
    texts: Texts,
    folder: ModelFolder | None,
    *,
    title: str,
    asked: str,
    skipped: Mapping[str, str],
    predicted: dict[str, Any],
    why: str,
) -> RunRecord:
    """Start the record, and show what is about to be done; `why` as in `Dtype`."""
    windows, config = texts.calibration, job.config
    record = RunRecord(
        arguments=asdict(config),
        recipe=asdict(job.recipe) | {"text": job.method()},
        model={
            "name": folder.name if folder else config.model,
            "hub_id": folder.hub_id if folder else None,
            "commit": folder.commit if folder else None,
            "license": licence(folder.path) if folder else {},
            "class": type(work.model).__name__,
            "parameters": work.parameters,
            "blocks": len(work.blocks),
        },
        calibration={
            "text": windows.text,
            "samples": windows.ids.shape[0],
            "seqlen": windows.ids.shape[1],
            "tokens": windows.tokens(),
            "seed": config.seed,
        },
        compute={
            "device": str(work.device),
            "dtype": dtype_name(work.dtype),
            "why": why,
            "processes": job.ranks.size,
        },
        predicted=predicted,
        skipped=dict(skipped),
        seconds=job.clock.seconds,
        phase_memory=job.clock.memory,
        size={"bytes_before": work.nbytes},
    )
    job.clock.device = work.device
    job.progress.header(record, title, asked)
    if folder and folder.bundled:
        size = f"{work.parameters / 1e6:.0f}M-parameter demo"
        job.progress.note(f"llama is the bundled {size}; for a real model pass a Hub id such as {EXAMPLE}{folder.shadowed}")
    if apart := [name for name, why in record.skipped.items() if why.endswith("of no linear layer")]:
        job.progress.note(f"left alone: {count(len(apart), 'weight')} of no linear layer (fused experts?), such as {apart[0]}")
    for note in (*texts.notes, *([predicted["short"]] if "short" in predicted else [])):
        job.progress.note(note)
    return record
