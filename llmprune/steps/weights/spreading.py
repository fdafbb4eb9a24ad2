"""From a job's sparsity to a pattern for each matrix, by what a scan of the dense model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.data.windows import Texts
from llmprune.job.allocation import as_texts
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.job.scan import Allocation, Scan, Scanned, by_kind, loss, total_weights
from llmprune.numerics.patterns import Pattern, Unstructured, parse
from llmprune.output.resume import Manifest
from llmprune.steps.base import Work
from llmprune.steps.weights.allocate import ALLOCATORS
from llmprune.steps.weights.allocate.base import grid, share
from llmprune.steps.weights.before import before_a_run
from llmprune.steps.weights.budget import WeightBudget
from llmprune.steps.weights.searching import kept_in, searched, searches
from llmprune.steps.weights.selection import Selection, fitting

UNIFORM = "uniform"
_ADDED = "as if each matrix's loss added up"


def spread(
    job: Job,
    work: Work,
    selection: Selection,
    texts: Texts,
    record: RunRecord,
    manifest: Manifest | None,
    budget: WeightBudget | None = None,
) -> Selection:
    """`selection` with the patterns that the job's way to allocate, or `budget`, gives; an unfinished run may know them.

    Raises:
        InputError: the job's scan is of another model, or has not measured what is needed.
    """
    if budget is None and (job.config.allocate == UNIFORM or job.pattern is None):
        return selection
    known = job.ranks.agree(manifest.known if manifest else {})
    if "allocation" not in known:
        known = _Spreader(job, work, selection, texts, record, known.get("scan", {}), manifest).decide(budget)
        if manifest:
            manifest.known = known
            manifest.begin()
    record.recipe["allocation"] = {name: value for name, value in known.items() if name != "allocation"}
    job.progress.note(known["text"])
    selection = selection.spread({name: _pattern(text) for name, text in known["allocation"].items()})
    record.skipped |= selection.skipped
    return selection


@dataclass(frozen=True, slots=True)
class _Spreader:
    """`measured`: what an unfinished scan knows, by block."""

    job: Job
    work: Work
    selection: Selection
    texts: Texts
    record: RunRecord
    measured: dict[str, Any]
    manifest: Manifest | None

    def decide(self, budget: WeightBudget | None) -> dict[str, Any]:
        """The allocation, and what to record of it."""
        if budget is not None:
            return self._within(budget)
        job, search = self.job, dict[str, Any]()
        assert job.pattern is not None
        if searches(job):
            scan, allocation, search = searched(job, self.work, self.selection, self.texts, self.record, self.manifest)
        else:
            scan = self._scan(job.pattern, grid(job.pattern))
            allocation = ALLOCATORS.get(job.config.allocate).allocate(scan, job.pattern)
        allocation = job.ranks.agree(allocation)
        uniform, reckoned = (reckoned_loss(scan, own) for own in (dict.fromkeys(allocation, job.pattern), allocation))
        return {
            "allocation": dict(as_texts(allocation)),
            "how": job.config.allocate,
            "probed": scan.probed,
            "reckoned_loss": reckoned,
            "reckoned_loss_uniform": uniform,
            **search,
            "text": (
                f"allocated by {job.config.allocate}: {describe(scan.matrices, allocation)}; reckoned to lose {reckoned:.4f} "
                f"nats a token, uniform {uniform:.4f}, {_ADDED}{search.get('text', '')}"
            ),
        }

    def _within(self, budget: WeightBudget) -> dict[str, Any]:
        scan = self._scan(budget.towards, budget.grid())
        allocation = self.job.ranks.agree(budget.allocate(scan))
        reckoned, budgets = reckoned_loss(scan, allocation), budget.told(allocation)
        kept = ", ".join(f"{left:,} of {whole:,} {noun} ({left / whole:.1%})" for noun, whole, left in budgets)
        return {
            "allocation": dict(as_texts(allocation)),
            "how": "budget",
            "probed": scan.probed,
            "reckoned_loss": reckoned,
            "budgets": budgets,
            "text": f"{describe(scan.matrices, allocation)}: {kept}; reckoned to lose {reckoned:.4f} nats a token, {_ADDED}",
        }

    def _scan(self, pattern: Pattern, levels: Sequence[Pattern]) -> Scan:
        """The job's, or one of the dense model now, of the selected matrices."""
        scan, job = self.job.scan, self.job
        if scan is None:
            scanner = before_a_run(job, self.work, frozenset(self.selection.patterns), self.texts, levels, pattern)
            scan = scanner.scan(self.record, self.measured, kept_in(self.manifest))
        return fitting(scan, self.selection)


def reckoned_loss(scan: Scan, allocation: Allocation) -> float:
    """Nats a token that all matrices together are reckoned to lose, as if losses added up."""
    return sum(loss(one, scan.probe, allocation[one.name]) for one in scan.matrices)


def describe(matrices: Sequence[Scanned], allocation: Allocation) -> str:
    """By kind of matrix, in words."""
    parts = []
    for kind, own in by_kind(matrices).items():
        patterns = [allocation[one.name] for one in own]
        if all(isinstance(pattern, Unstructured) for pattern in patterns):
            dropped = [1 - share(pattern) for pattern in patterns]
            mean = sum(one.weights * drop for one, drop in zip(own, dropped, strict=True)) / total_weights(own)
            parts.append(f"{kind} {mean:.0%} ({min(dropped):.0%} to {max(dropped):.0%})")
        else:
            texts = list(as_texts(dict(enumerate(patterns))).values())  # type: ignore[arg-type]
            parts.append(f"{kind} {', '.join(f'{texts.count(text)} x {text}' for text in dict.fromkeys(texts))}")
    return "; ".join(parts)


def _pattern(text: str) -> Pattern | None:
    return None if text == "dense" else parse(text)
