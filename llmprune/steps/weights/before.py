"""The scan of the dense model that comes before a run which spreads its sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.numerics.patterns import Pattern, parse
from llmprune.steps.base import Work
from llmprune.steps.weights.library import Library
from llmprune.steps.weights.scanning import Scanner


def before_a_run(
    job: Job,
    work: Work,
    sites: frozenset[str],
    texts: Texts,
    levels: Sequence[Pattern],
    pattern: Pattern,
    library: Library | None = None,
) -> Scanner:
    """Of what it takes to spread `pattern`: from half of the windows, since the run then reads them all.

    Args:
        levels: at which errors are measured. Where the job has a scan, that says what each matrix costs the model.
    """
    windows = texts.calibration
    half = windows.first(windows.ids.numel() // 2, job.ranks.size)
    probe = pattern if job.scan is None else parse(job.scan.probe)
    return Scanner(job, work, replace(texts, calibration=half), sites, levels, probe, library, probes=job.scan is None)
