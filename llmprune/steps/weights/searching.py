"""An allocation by trying: solve matrices at several levels, have the allocator try what they make, keep what it finds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from llmprune.base.words import count
from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.job.scan import Allocation, Scan
from llmprune.output.resume import Manifest
from llmprune.steps.base import Work
from llmprune.steps.weights.allocate import ALLOCATORS
from llmprune.steps.weights.allocate.base import Trials, grid
from llmprune.steps.weights.before import before_a_run
from llmprune.steps.weights.library import Library
from llmprune.steps.weights.scanning import Keep
from llmprune.steps.weights.selection import Selection, fitting
from llmprune.steps.weights.trying import Trial

_FOLDER = "levels"  # of the library, in that of the unfinished run


def searched(
    job: Job, work: Work, selection: Selection, texts: Texts, record: RunRecord, manifest: Manifest | None
) -> tuple[Scan, Allocation, dict[str, Any]]:
    """What the job's allocator finds, the scan that it started from, and what to record of the search."""
    assert job.pattern is not None
    sites = frozenset(selection.patterns)
    with _library(job, manifest) as library:
        scan = _solved(job, work, texts, sites, record, library, manifest)
        scan = fitting(job.scan or scan, selection)
        watch = _Watch(job, manifest)
        trial = Trial(job, work, texts, sites, library)
        trials = Trials(trial.measured, job.config.seed, watch.known, watch.keep)
        allocation = ALLOCATORS.get(job.config.allocate).allocate(scan, job.pattern, trials)
        if manifest:
            library.clear()
    return scan, allocation, {**watch.known, "text": _describe(watch.known)}


def searches(job: Job) -> bool:
    """Whether the job's allocator tries candidates."""
    return getattr(ALLOCATORS.get(job.config.allocate), "measures", False)


@contextmanager
def _library(job: Job, manifest: Manifest | None) -> Iterator[Library]:
    """In the unfinished run's folder, where there is one; else in one that is gone afterwards."""
    if manifest:
        yield Library(manifest.folder / _FOLDER, job.ranks)
    elif job.ranks.first:
        with tempfile.TemporaryDirectory() as folder:
            yield Library(Path(folder), job.ranks)
    else:
        yield Library(None, job.ranks)


def _solved(
    job: Job,
    work: Work,
    texts: Texts,
    sites: frozenset[str],
    record: RunRecord,
    library: Library,
    manifest: Manifest | None,
) -> Scan:
    """Scan the model and fill the library, but for what an earlier run has done."""
    assert job.pattern is not None
    levels = grid(job.pattern, searched=True)
    known = dict(manifest.known) if manifest else {}
    kept = {
        block: own
        for block, own in known.get("scan", {}).items()
        if all(library.has(one["name"], [text for text in one["errors"] if text in map(str, levels)]) for one in own)
    }
    whole = known.get("scanned") if kept and len(kept) == len(known["scan"]) else None
    kept, whole = job.ranks.agree((kept, whole))
    if whole is not None:
        return msgspec.convert(whole, Scan)
    scan = before_a_run(job, work, sites, texts, levels, job.pattern, library).scan(record, kept, kept_in(manifest))
    if manifest:
        manifest.known |= {"scanned": asdict(scan)}
        manifest.begin()
    return scan


def kept_in(manifest: Manifest | None) -> Keep:
    """Keeps what a scan has measured so far for a run that goes on; nothing on a process that does not write."""

    def keep(measured: Mapping[str, Any]) -> None:
        if manifest:
            manifest.known |= {"scan": measured}
            manifest.begin()

    return keep


class _Watch:
    """Keeps what a search has found, shows it, and looks at the time, that of an earlier run included."""

    def __init__(self, job: Job, manifest: Manifest | None) -> None:
        self._job, self._manifest = job, manifest
        self.known: dict[str, Any] = job.ranks.agree(manifest.known.get("search", {}) if manifest else {})
        self._began = time.monotonic() - self.known.get("seconds", 0.0)

    def keep(self, found: Mapping[str, Any]) -> bool:
        """Whether there is time to go on: the same on all processes."""
        seconds = self._job.ranks.agree(time.monotonic() - self._began)
        left = 60 * self._job.config.search_minutes - seconds
        self.known.clear()
        self.known.update(found, seconds=seconds)
        if self._manifest:
            self._manifest.known |= {"search": self.known}
            self._manifest.begin()
        self._job.progress.searched(found, left)
        return left > 0


def _describe(known: Mapping[str, Any]) -> str:
    """Such as `; 31 generations; measured on 32,768 tokens: uniform 0.0612, sensitivity 0.0481, found 0.0440`."""
    nats = ", ".join(f"{name} {own:.4f}" for name, own in known["nats"].items())
    return f"; {count(known['generation'], 'generation')}; measured on {count(known['tokens'], 'token')}: {nats}"
