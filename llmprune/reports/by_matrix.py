"""Tables of a page, a row a block and kind of matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import mean
from typing import Any, TypeVar

from llmprune.job.record import CodeRecord, RunRecord, SiteRecord, mean_known
from llmprune.reports.cells import cell, table, text_cell

T = TypeVar("T", SiteRecord, CodeRecord)


def kind_of(name: str) -> str:
    """A site's name within its block, with * for the number of an expert."""
    parts = name.split(".")
    first = next((number for number, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join("*" if part.isdecimal() else part for part in parts[first + 1 :]) or name


def _by_kind(records: Iterable[T]) -> Iterator[tuple[int, str, list[T]]]:
    """Block, kind, with how many there are of several, and the matrices."""
    found: dict[tuple[int, str], list[T]] = {}
    for one in records:
        found.setdefault((one.block, kind_of(one.name)), []).append(one)
    for (block, kind), own in found.items():
        yield block, kind if len(own) == 1 else f"{kind} ({len(own)})", own


def matrices(record: RunRecord) -> dict[str, Any] | None:
    """One row a block and kind of matrix."""
    rows = [
        [
            cell(block, str),
            text_cell(kind),
            text_cell(own[0].pattern),
            text_cell(f"{own[0].shape[0]} x {own[0].shape[1]}"),
            cell(mean(site.sparsity for site in own), "{:.2%}".format),
            cell(mean_known(site.error for site in own), "{:.2%}".format),
            cell(sum(site.seconds for site in own), "{:.3f}".format),
        ]
        for block, kind, own in _by_kind(record.sites)
    ]
    return table(("block", "matrix", "pattern", "shape", "zeros", "error", "seconds"), rows) if rows else None


def codes(record: RunRecord) -> dict[str, Any] | None:
    """One row a block and kind of quantised matrix."""
    rows = [
        [
            cell(block, str),
            text_cell(kind),
            cell(own[0].bits, str),
            cell(own[0].group, str),
            cell(mean(one.zeros for one in own), "{:.2%}".format),
            cell(mean_known(one.error for one in own), "{:.2%}".format),
            cell(sum(one.seconds for one in own), "{:.3f}".format),
        ]
        for block, kind, own in _by_kind(record.codes)
    ]
    return table(("block", "matrix", "bits", "columns a scale", "codes of 0", "error", "seconds"), rows) if rows else None
