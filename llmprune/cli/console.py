"""What a run shows: a live bar on a terminal, one plain line a block elsewhere, tables at both ends."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from llmprune.base.words import command_line, count, literal, size
from llmprune.cli.tables import recovery_table, run_table, share
from llmprune.job.progress import Progress, Progressed
from llmprune.job.record import CodeRecord, Reconstruction, Removal, RunRecord, SiteRecord, mean_known
from llmprune.job.scan import Scanned
from llmprune.models.resolve import spelled
from llmprune.output.resume import is_turn

_TITLE = len("calibration  ")  # where the values of the header begin
_WIDEST = 10_000  # more columns than a table needs
_NARROWEST = 20  # columns that text is given beside its indent
_FIXED = "\N{NO-BREAK SPACE}"


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
        self._rounded: list[CodeRecord] = []
        self._fit, self._came = "", ""
        self._best = 0.0  # divergence that a search has come to

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def header(self, record: RunRecord, what: str, asked: str) -> None:
        model, text, arguments = record.model, record.calibration, record.arguments
        parameters = count(model["parameters"], "parameter")
        order = ", stage by stage" if record.recipe["true_sequential"] else ", one pass a block"
        facts = {
            "model": f"{model['name']} ({model['class']}, {parameters}, {count(model['blocks'], 'block')})",
            what: asked,
            "method": f"{record.recipe['text']}{order if arguments['sparsity'] or arguments['allocation'] else ''}",
            "calibration": f"{text['text']}, {count(text['samples'], 'window')} x {text['seqlen']} tokens, seed {text['seed']}",
            "compute": _compute(record.compute),
            **({"needs": record.predicted["text"]} if record.predicted else {}),
        }
        self.facts(facts)

    def facts(self, facts: Mapping[str, str]) -> None:
        for title, value in facts.items():
            self._line(f"{title:<{_TITLE}}{value}", _TITLE)

    def note(self, text: str) -> None:
        self._line(f"note: {text}", len("note: "))

    def start(self, blocks: int, sites: int) -> None:
        self._blocks, self._sites, self._done, self._began = blocks, sites, 0, time.monotonic()
        if self._console.is_terminal:
            for task in self._live.task_ids:  # of what was removed, before weights are pruned
                self._live.remove_task(task)
            self._live.start()
            self._task = self._live.add_task("", total=sites, block=f"1/{blocks}", now="", eta="-")

    def solving(self, site: str) -> None:
        if self._console.is_terminal:
            error = f"(last: error {share(self._in_block[-1].error)})" if self._in_block else ""
            self._live.update(self._task, now=f"{site} {error}")

    def site(self, site: SiteRecord) -> None:
        self._in_block.append(site)
        self._site_done(
            f"  {site.name}  {site.pattern}  {site.shape[0]} x {site.shape[1]}  zeros {site.sparsity:.2%}  "
            f"output error {share(site.error)}  {count(site.tokens, 'token')}  {site.seconds:.2f} s"
        )

    def quantised(self, one: CodeRecord) -> None:
        self._rounded.append(one)
        self._site_done(
            f"  {one.name}  {one.bits} bits, groups of {one.group}  {one.shape[0]} x {one.shape[1]}  "
            f"output error {share(one.error)}  {one.seconds:.2f} s"
        )

    def _site_done(self, told: str) -> None:
        self._done += 1
        if self._each_site:
            self._line(told, 4)
        if self._console.is_terminal:
            self._live.update(self._task, completed=self._done, eta=self._eta())

    def reconstructed(self, result: Reconstruction) -> None:
        self._fit = (
            f"  block fit {result.before:.3%} -> {result.after:.3%} ({count(result.steps, 'step')}, rate {result.rate:g}, "
            f"{size(result.nbytes)})"
        )

    def scanned(self, matrices: Sequence[Scanned], pattern: str) -> None:
        errors = "  ".join(f"{one.kind} {share(one.errors.get(pattern))}" for one in matrices)
        self._came = f"scanned; output error at {pattern}: {errors}"

    def searched(self, found: Mapping[str, Any], seconds_left: float) -> None:
        left = f"{max(seconds_left, 0):.0f} s left at most"
        told = f"search: generation {found['generation']}, KL {found['best']:.5f} nats a token, {left}"
        if found["best"] != self._best:
            self._line(told)
            self._best = found["best"]
        if self._console.is_terminal:
            self._live.update(self._task, now=told)

    def removed(self, removal: Removal) -> None:
        self._gone.append(removal)

    def repeated(self, sites: int) -> None:
        self._sites -= sites
        self._came = "finished by an earlier run"
        if self._console.is_terminal:
            self._live.update(self._task, total=self._sites)

    def block(self, index: int) -> None:
        pruned = f"output error: {_errors(self._in_block)}{self._fit}" if self._in_block else "nothing pruned"
        came = (
            self._came
            or _removals(self._gone)
            or _rounding(self._rounded)
            or (self._fit.strip() or "stays" if not self._sites else pruned)
        )
        if not self._sites:
            self._done = index + 1
        title = f"block {index + 1}/{self._blocks}  "
        self._line(f"{title}{came}  ETA {self._eta()}", len(title))
        self._in_block, self._gone, self._rounded, self._fit, self._came = [], [], [], "", ""
        if self._console.is_terminal:
            self._live.update(self._task, block=f"{min(index + 2, self._blocks)}/{self._blocks}")

    def trained(self, progressed: Progressed) -> None:
        now = "" if progressed.trained is None else f"trained {progressed.trained:.4f}  "
        self._line(
            f"step {progressed.step}/{progressed.steps}  loss: {now}held out {progressed.held_out:.4f}  "
            f"{progressed.tokens_per_second:,.0f} tokens/s  ETA {_time(progressed.seconds_left)}"
        )

    def recovered(self, record: RunRecord, output: Path) -> None:
        self._show(recovery_table(record))
        if is_turn(output):
            return
        self._line(f"wrote {output}; next:")
        self._console.print(
            _next_steps(output, own=bool(record.structure.get("differ_by_layer"))), markup=False, soft_wrap=True
        )

    def summary(self, record: RunRecord, output: Path | None) -> None:
        self._stop()
        self._show(run_table(record))
        if output is not None and not is_turn(output):
            self._line(f"wrote {output}; next:")
            steps = _next_steps(output, own=bool(record.structure.get("differ_by_layer")))
            if record.pruned is None:
                steps += f"\n  {_to_evaluate(record, output)}"
            self._console.print(steps, markup=False, soft_wrap=True)  # to paste, and so whole

    def _show(self, table: Table) -> None:
        if not self._console.is_terminal:  # as wide as its rows are
            table.width = self._console.measure(table, options=self._console.options.update(width=_WIDEST)).maximum
        self._console.print(table, soft_wrap=True)

    def _line(self, text: str, indent: int = 0) -> None:
        """On a terminal broken between words, what follows the first line indented; elsewhere whole, as logs want it."""
        shown = _wrapped(text, self._console.width, indent) if self._console.is_terminal else text
        self._console.print(shown, markup=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._live.live.is_started:
            self._live.stop()

    def _eta(self) -> str:
        if not self._done:
            return "-"
        return _time((time.monotonic() - self._began) / self._done * ((self._sites or self._blocks) - self._done))


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _wrapped(text: str, width: int, indent: int) -> str:
    """In lines of at most `width`, broken at blanks; what two blanks set apart stays together where it fits."""
    room = max(width - indent, _NARROWEST)
    parts = [part if len(part) > room else part.replace(" ", _FIXED) for part in text.split("  ")]
    lines = textwrap.wrap(
        "  ".join(parts),
        indent + room,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines).replace(_FIXED, " ")


def _to_evaluate(record: RunRecord, output: Path) -> str:
    """The command that measures what this run did not: perplexity, beside the dense model's where that has a name."""
    named = record.model["name"] != record.model["class"]
    dense = str(record.arguments["model"])
    beside = ["--baseline", f"./{dense}" if dense.startswith("-") else dense] if named else []
    return command_line("llmprune", "eval", spelled(output), *beside)


def _next_steps(output: Path, *, own: bool) -> str:
    """`own`: only llmprune loads it."""
    load = f"import llmprune; llmprune.load({literal(spelled(output))})"
    if not own:
        load = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({literal(output)})"
    return f"  {command_line('llmprune', 'verify', output)}\n  {command_line('python', '-c', load)}"


def _compute(how: Mapping[str, Any]) -> str:
    """In which dtype, why, where, and in how many processes."""
    shared = f", {count(how['processes'], 'process')}" if how["processes"] > 1 else ""
    why = f" ({how['why']})" if how["why"] else ""
    return f"{how['dtype']} on {how['device']}{shared}{why}"


def _rounding(done: Sequence[CodeRecord]) -> str:
    """How much of the outputs of a block's matrices rounding lost, on average."""
    return f"rounded, output error of a matrix {share(mean_known(one.error for one in done))}" if done else ""


def _removals(gone: Sequence[Removal]) -> str:
    """What a block lost, experts together."""
    by_name: dict[str, list[Removal]] = {}
    for one in gone:
        by_name.setdefault(one.site.rsplit(".", 1)[-1], []).append(one)
    parts = []
    for name, each in by_name.items():
        error = _mean([one.error for one in each])
        parts.append(f"{each[0].kept} of {each[0].count} {each[0].kind}, {name} error {error}")
    return "  ".join(parts)


def _errors(sites: Sequence[SiteRecord]) -> str:
    """The sites of a block with their errors, those of one name (experts) together."""
    by_name: dict[str, list[float | None]] = {}
    for site in sites:
        by_name.setdefault(site.name.rsplit(".", 1)[-1], []).append(site.error)
    return "  ".join(f"{name} {_mean(errors)}" for name, errors in by_name.items())


def _mean(errors: Sequence[float | None]) -> str:
    """Of one matrix, or of several and how many that is the mean of."""
    known = sum(error is not None for error in errors)
    rest = f" of {len(errors)}; no token reached the others" if known < len(errors) else ""
    return share(mean_known(errors)) + (f" (mean of {known}{rest})" if len(errors) > 1 and known else "")
