"""What a run shows: a live bar on a terminal, one plain line a block elsewhere, tables at both ends."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from llmprune.evaluate.perplexity import excess_loss
from llmprune.models.resolve import spelled
from llmprune.report.record import Reconstruction, Removal, RunRecord, SiteRecord


class Progress:
    """What the pipeline tells as it works. This one shows nothing; subclasses show what they like."""

    def header(self, record: RunRecord, what: str, asked: str) -> None: ...

    def note(self, text: str) -> None: ...

    def start(self, blocks: int, sites: int) -> None: ...

    def solving(self, site: str) -> None: ...

    def site(self, site: SiteRecord) -> None: ...

    def reconstructed(self, result: Reconstruction) -> None: ...

    def removed(self, removal: Removal) -> None: ...

    def repeated(self, sites: int) -> None: ...

    def block(self, index: int) -> None: ...

    def summary(self, record: RunRecord, output: Path | None) -> None: ...


class Console(Progress):
    """Shows on a console. Use as a context manager, so that the live bar is taken down on any exit.

    Args:
        each_site: a line for each matrix, too.
    """

    def __init__(self, console: RichConsole, *, each_site: bool = False) -> None:
        self._console, self._each_site = console, each_site
        self._live = Bar(
            TextColumn("block {task.fields[block]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} sites"),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=self._console,
            transient=True,
        )
        self._in_block: list[SiteRecord] = []
        self._gone: list[Removal] = []
        self._fit, self._came = "", ""

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def header(self, record: RunRecord, what: str, asked: str) -> None:
        model, text, arguments = record.model, record.calibration, record.arguments
        order = ", stage by stage" if record.recipe["true_sequential"] else ", one pass a block"
        for title, value in {
            "model": f"{model['name']} ({model['class']}, {model['parameters']:,} parameters, {model['blocks']} blocks)",
            what: asked,
            "method": f"{record.recipe['text']}{order if arguments['sparsity'] else ''}",
            "calibration": f"{text['text']}, {text['samples']} windows x {text['seqlen']} tokens, seed {text['seed']}",
            "compute": f"{record.compute['dtype']} on {record.compute['device']}{_shared(record.compute['processes'])}",
            **({"needs": record.predicted["text"]} if record.predicted else {}),
        }.items():
            self._line(f"{title:<11}  {value}")

    def note(self, text: str) -> None:
        self._line(f"note: {text}")

    def start(self, blocks: int, sites: int) -> None:
        self._blocks, self._sites, self._done, self._began = blocks, sites, 0, time.monotonic()
        if self._console.is_terminal:
            self._live.start()
            self._task = self._live.add_task("", total=sites, block=f"1/{blocks}", now="", eta="-")

    def solving(self, site: str) -> None:
        if self._console.is_terminal:
            error = f"(last: error {self._in_block[-1].error:.2%})" if self._in_block else ""
            self._live.update(self._task, now=f"{site} {error}")

    def site(self, site: SiteRecord) -> None:
        self._done += 1
        self._in_block.append(site)
        if self._each_site:
            self._line(
                f"  {site.name}  {site.pattern}  {site.shape[0]} x {site.shape[1]}  zeros {site.sparsity:.2%}  "
                f"output error {site.error:.2%}  {site.tokens:,} tokens  {site.seconds:.2f} s"
            )
        if self._console.is_terminal:
            self._live.update(self._task, completed=self._done, eta=self._eta())

    def reconstructed(self, result: Reconstruction) -> None:
        self._fit = (
            f"  block fit {result.before:.3%} -> {result.after:.3%} ({result.steps} steps, rate {result.rate:g}, "
            f"{result.nbytes / 2**20:,.0f} MiB)"
        )

    def removed(self, removal: Removal) -> None:
        self._gone.append(removal)

    def repeated(self, sites: int) -> None:
        self._sites -= sites
        self._came = "finished by an earlier run"
        if self._console.is_terminal:
            self._live.update(self._task, total=self._sites)

    def block(self, index: int) -> None:
        pruned = f"output error: {_errors(self._in_block)}{self._fit}" if self._in_block else "nothing pruned"
        came = self._came or _removals(self._gone) or ("stays" if not self._sites else pruned)
        if not self._sites:
            self._done = index + 1
        line = f"block {index + 1}/{self._blocks}  {came}  ETA {self._eta()}"
        self._in_block, self._gone, self._fit, self._came = [], [], "", ""
        self._line(line)
        if self._console.is_terminal:
            self._live.update(self._task, block=f"{min(index + 2, self._blocks)}/{self._blocks}")

    def summary(self, record: RunRecord, output: Path | None) -> None:
        self._stop()
        self._console.print(_table(record), soft_wrap=True)
        if output is not None:
            own = bool(record.structure.get("differ_by_layer"))
            self._line(f"wrote {output}; next:\n{_next_steps(output, own=own)}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._live.live.is_started:
            self._live.stop()

    def _eta(self) -> str:
        if not self._done:
            return "-"
        left = (time.monotonic() - self._began) / self._done * ((self._sites or self._blocks) - self._done)
        return f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"


def _table(record: RunRecord) -> Table:
    table = Table("measured in this run", "before", "after", title=None)
    for column in table.columns[1:]:
        column.justify = "right"
    if record.dense and record.pruned:
        protocol = f"{escape(record.pruned.text)}, {record.pruned.windows} windows x {record.pruned.length} tokens"
        table.add_row(f"perplexity ({protocol})", f"{record.dense.value:.3f}", f"{record.pruned.value:.3f}")
        table.add_row("loss, nats a token more", "", f"{excess_loss(record.dense, record.pruned):+.4f}")
    for what, before in record.structure.get("before", {}).items():
        table.add_row(what.replace("_", " "), f"{before:,}", f"{record.structure['after'][what]:,}")
    if record.sites:
        asked = str(record.arguments["sparsity"])
        share = record.zeros() / record.weights()
        table.add_row(f"zeros in {len(record.sites)} pruned matrices (asked: {asked})", "", f"{share:.2%}")
        table.add_row("nonzero weights in them", f"{record.size['nonzero_before']:,}", f"{record.size['nonzero_after']:,}")
        mean = sum(site.error for site in record.sites) / len(record.sites)
        table.add_row("output error of a matrix, mean", "", f"{mean:.2%}")
    if "bytes_after" in record.size:
        before, after = record.size["bytes_before"], record.size["bytes_after"]
        table.add_row(f"weight bytes{' (zeros are stored)' if record.sites else ''}", f"{before:,}", f"{after:,}")
    for phase, seconds in record.seconds.items():
        table.add_row(f"seconds: {phase}", "", f"{seconds:.1f}")
    if overhead := record.overhead():
        table.add_row("pruning, as a multiple of its forward passes", "", f"{overhead:.2f}x")
    for place, peak in record.peak_memory.items():
        table.add_row(f"peak memory, {place}", "", f"{peak / 2**20:,.0f} MiB")
    return table


def _next_steps(output: Path, *, own: bool) -> str:
    """`own`: only llmprune loads it."""
    path = json.dumps(spelled(output))
    load = f"import llmprune; llmprune.load({path})"
    if not own:
        load = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({path})"
    return f"  llmprune verify {shlex.quote(str(output))}\n  python -c {shlex.quote(load)}"


def _shared(processes: int) -> str:
    return f", {processes} processes" if processes > 1 else ""


def _removals(gone: Sequence[Removal]) -> str:
    """What a block lost, experts together."""
    by_name: dict[str, list[Removal]] = {}
    for one in gone:
        by_name.setdefault(one.site.rsplit(".", 1)[-1], []).append(one)
    parts = []
    for name, each in by_name.items():
        many = f" (mean of {len(each)})" if len(each) > 1 else ""
        error = sum(one.error for one in each) / len(each)
        parts.append(f"{each[0].kept} of {each[0].count} {each[0].kind}, {name} error {error:.2%}{many}")
    return "  ".join(parts)


def _errors(sites: Sequence[SiteRecord]) -> str:
    """The sites of a block with their errors, those of one name (experts) together."""
    by_name: dict[str, list[float]] = {}
    for site in sites:
        by_name.setdefault(site.name.rsplit(".", 1)[-1], []).append(site.error)
    many = {name: f" (mean of {len(errors)})" if len(errors) > 1 else "" for name, errors in by_name.items()}
    return "  ".join(f"{name} {sum(errors) / len(errors):.2%}{many[name]}" for name, errors in by_name.items())
