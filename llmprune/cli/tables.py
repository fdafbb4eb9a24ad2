"""The tables that a run ends with."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from llmprune.base.words import count, size
from llmprune.cost.footprint import changes
from llmprune.job.record import COMPUTED, Perplexity, RunRecord, excess_loss
from llmprune.job.recovery import measure, shown
from llmprune.job.speedup import speed_rows


def run_table(record: RunRecord) -> Table:
    table = Table("measured in this run", "before", "after", title=None)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in _measured(record):
        table.add_row(*row)
    if computed := list(_computed(record)):
        table.add_section()
        table.add_row(f"[bold]{COMPUTED}[/bold]")
    for row in computed:
        table.add_row(*row)
    return table


def _measured(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """What is measured, before and after."""
    if record.dense and record.pruned:
        found = record.pruned
        yield f"perplexity ({_protocol(found)})", f"{record.dense.value:.3f}", f"{found.value:.3f}"
        yield "loss, nats a token more", "", f"{excess_loss(record.dense, record.pruned):+.4f}"
    yield from speed_rows(record.structure)
    if record.sites:
        asked = record.arguments["sparsity"] or "by matrix"
        zeros = record.zeros() / record.weights()
        yield f"zeros in {count(len(record.sites), 'pruned matrix')} (asked: {asked})", "", f"{zeros:.2%}"
        yield "nonzero weights in them", f"{record.size['nonzero_before']:,}", f"{record.size['nonzero_after']:,}"
        yield "output error of a matrix, mean", "", share(record.output_error())
    if record.rounding.get("before"):
        before, after = (Perplexity(**record.rounding[name]) for name in ("before", "after"))
        yield f"of it rounding, perplexity ({_protocol(after)})", f"{before.value:.3f}", f"{after.value:.3f}"
    if record.codes:
        yield f"output error of {count(len(record.codes), 'rounded matrix')}, mean", "", share(record.rounding_error())
    for phase, seconds in record.seconds.items():
        yield f"seconds: {phase}", "", f"{seconds:.1f}"
    if overhead := record.overhead():
        yield "pruning time / time of its forward passes", "", f"{overhead:.2f}x"
    for place, peak in record.peak_memory.items():
        yield f"peak memory, {place}", "", size(peak)


def _computed(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """What follows from the sizes of tensors."""
    for what, was, now in changes(record.structure, record.recipe):
        yield what, f"{was:,}", f"{now:,}"
    if "bytes_after" in record.size:
        before, after = record.size["bytes_before"], record.size["bytes_after"]
        yield f"weight bytes{' (zeros are stored)' if record.sites else ''}", f"{before:,}", f"{after:,}"
        if bits := record.code_bits():
            yield "bits a weight that is stored as a code, scales counted", "", f"{bits:.3f}"
        if "bytes_packed" in record.size:
            yield "weight bytes, packed by llmprune pack", f"{before:,}", f"{record.size['bytes_packed']:,}"


def recovery_table(record: RunRecord) -> Table:
    """What training afterwards changed, as measured."""
    table, told = Table("measured in this run", "before", "after", title=None), record.recoveries[-1]
    for number in (1, 2):
        table.columns[number].justify = "right"
    asked = told["arguments"]
    before, after = (shown(asked, told[name]) for name in ("loss_before", "loss_after"))
    table.add_row(f"{measure(asked, 'the teacher')} on held-out windows of {escape(told['text'])}", before, after)
    if record.dense and record.pruned:
        found, lost = record.pruned, told["excess_loss_before"]
        was = f"{record.dense.value * math.exp(lost):.3f}"
        table.add_row(f"perplexity ({_protocol(found)}); dense {record.dense.value:.3f}", was, f"{found.value:.3f}")
        table.add_row("loss, nats a token more than dense", f"{lost:+.4f}", f"{excess_loss(record.dense, found):+.4f}")
    table.add_row("tokens trained on", "", f"{told['tokens']:,}")
    if "best" in told:
        table.add_row("best step", "", f"{told['best']} of {told['steps']}")
    table.add_row("seconds of training", "", f"{told['seconds']:.1f}")
    return table


def _protocol(found: Perplexity) -> str:
    return f"{escape(found.text)}, {count(found.windows, 'window')} x {found.length} tokens{found.computed()}"


def share(error: float | None) -> str:
    return "unknown (no token reached it)" if error is None else f"{error:.2%}"
