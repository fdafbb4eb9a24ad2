"""From a job's sparsity to a pattern for each matrix, by what a scan of the dense model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmprune.data.windows import Texts
from llmprune.job.allocation import as_texts
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.job.scan import Allocation, Scan, Scanned, loss, total_weights
from llmprune.numerics.patterns import Pattern, Unstructured, parse
from llmprune.output.resume import Manifest
from llmprune.steps.base import Work
from llmprune.steps.weights.allocate import ALLOCATORS
from llmprune.steps.weights.allocate.base import grid, share
from llmprune.steps.weights.scanning import before_a_run
from llmprune.steps.weights.searching import kept_in, searched, searches
from llmprune.steps.weights.selection import Selection, fitting

UNIFORM = "uniform"


def spread(job: Job, work: Work, selection: Selection, texts: Texts, record: RunRecord, manifest: Manifest | None) -> Selection:
    """`selection` with the patterns that the job's way to allocate gives, which an unfinished run may know already.

    Raises:
        InputError: the job's scan is of another model, or has not measured what is needed.
    """
    if job.config.allocate == UNIFORM or job.pattern is None:
        return selection
    known = job.ranks.agree(manifest.known if manifest else {})
    if "allocation" not in known:
        known = _decide(job, work, selection, texts, record, known.get("scan", {}), manifest)
        if manifest:
            manifest.known = known
            manifest.begin()
    record.recipe["allocation"] = {name: value for name, value in known.items() if name != "allocation"}
    job.progress.note(known["text"])
    return selection.spread({name: _pattern(text) for name, text in known["allocation"].items()})


def _decide(
    job: Job,
    work: Work,
    selection: Selection,
    texts: Texts,
    record: RunRecord,
    measured: dict[str, Any],
    manifest: Manifest | None,
) -> dict[str, Any]:
    assert job.pattern is not None
    search: dict[str, Any] = {}
    if searches(job):
        scan, allocation, search = searched(job, work, selection, texts, record, manifest)
    else:
        found = job.scan
        if found is None:
            scanner = before_a_run(job, work, frozenset(selection.patterns), texts, grid(job.pattern))
            found = scanner.scan(record, measured, kept_in(manifest))
        scan = fitting(found, selection)
        allocation = ALLOCATORS.get(job.config.allocate).allocate(scan, job.pattern)
    allocation = job.ranks.agree(allocation)
    reckoned = [reckoned_loss(scan, own) for own in (dict.fromkeys(allocation, job.pattern), allocation)]
    return {
        "allocation": dict(as_texts(allocation)),
        "how": job.config.allocate,
        "probed": scan.probed,
        "reckoned_loss": reckoned[1],
        "reckoned_loss_uniform": reckoned[0],
        **search,
        "text": describe(scan.matrices, allocation, job.config.allocate, *reckoned) + search.get("text", ""),
    }


def reckoned_loss(scan: Scan, allocation: Allocation) -> float:
    """Nats a token that all matrices together are reckoned to lose, as if losses added up."""
    return sum(loss(one, scan.probe, allocation[one.name]) for one in scan.matrices)


def describe(matrices: Sequence[Scanned], allocation: Allocation, how: str, uniform: float, reckoned: float) -> str:
    """By kind of matrix, in words."""
    kinds: dict[str, list[Scanned]] = {}
    for one in matrices:
        kinds.setdefault(one.kind, []).append(one)
    parts = []
    for kind, own in kinds.items():
        patterns = [allocation[one.name] for one in own]
        if all(isinstance(pattern, Unstructured) for pattern in patterns):
            dropped = [1 - share(pattern) for pattern in patterns]
            mean = sum(one.weights * drop for one, drop in zip(own, dropped, strict=True)) / total_weights(own)
            parts.append(f"{kind} {mean:.0%} ({min(dropped):.0%} to {max(dropped):.0%})")
        else:
            texts = list(as_texts(dict(enumerate(patterns))).values())  # type: ignore[arg-type]
            parts.append(f"{kind} {', '.join(f'{texts.count(text)} x {text}' for text in dict.fromkeys(texts))}")
    return (
        f"allocated by {how}: {'; '.join(parts)}; reckoned to lose {reckoned:.4f} nats a token, uniform {uniform:.4f}, as if "
        "each matrix's loss added up"
    )


def _pattern(text: str) -> Pattern | None:
    return None if text == "dense" else parse(text)
