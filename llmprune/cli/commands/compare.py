"""`llmprune compare`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.base.files import file_to_write
from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "prune models by several methods to several patterns, or by size, and print the table that papers print"
EXAMPLE = "llmprune compare llama --methods wanda sparsegpt balanced --sparsity 2:4 50% --output compare.json"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="bundled names, folders or Hub ids")
    parser.add_argument("--methods", nargs="+", metavar="M", help="methods and presets (default: all)")
    parser.add_argument("--sparsity", nargs="+", metavar="S", help="patterns (default: 2:4 4:8 50%% 60%% 70%%)")
    parser.add_argument(
        "--bits", nargs="+", type=int, metavar="N",
        help="compare by size: each pattern, dense too, rounded to codes of 8, 4 or 3 bits, or 16, not at all; "
        "then --methods is by default balanced, --sparsity dense 50%% 2:4 70%%",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N",
        help="calibration draws of each cell; of several, mean and standard deviation are shown (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--text", default="pydoc", help="to calibrate and, another split, to evaluate on (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, metavar="N", help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=100, metavar="N", help="evaluation windows (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument(
        "--output", default="compare.json", metavar="FILE",
        help="what is measured, cell by cell; asked for again, it goes on (default: %(default)s). Beside it: .md and .svg",
    )  # fmt: skip


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    output = file_to_write(options["output"])
    terminal.check_apart(*(output.with_suffix(suffix) for suffix in (".json", ".md", ".svg")), output)
    from llmprune.runs.compare import compare

    rest = {name: options[name] for name in ("seeds", "text", "samples", "seqlen", "windows", "device")}
    chosen = {"methods": options.get("methods"), "patterns": options.get("sparsity"), "bits": options.get("bits", ())}
    cells = compare(options["models"], output, **chosen, **rest, tell=terminal.say)
    draws = ", mean ± standard deviation of calibration draws" if any(cell["seed"] for cell in cells) else ""
    drawn = (_show_sizes if chosen["bits"] else _show)(cells, terminal, f"held-out {options['text']}{draws}", output)
    terminal.say(f"wrote {output}, {output.with_suffix('.md')}" + (f", {output.with_suffix('.svg')}" if drawn else ""))
    return Outcome({"cells": cells})


def _show(cells: list[dict[str, Any]], terminal: Terminal, text: str, output: Path) -> bool:
    """The table that papers print, and its plot; False where that cannot be drawn."""
    from llmprune.reports.comparison import papers_table
    from llmprune.reports.comparison_plot import plot

    for model, header, rows in papers_table(cells):
        _print(terminal, f"{model}: token perplexity, {text}", header, rows)
    return plot(cells, output.with_suffix(".svg"))


def _show_sizes(cells: list[dict[str, Any]], terminal: Terminal, text: str, output: Path) -> bool:
    """Loss by size, in words, as a table and a plot."""
    from llmprune.reports.sizes import by_size, table, words
    from llmprune.reports.sizes_plot import plot

    for model, own in by_size(cells).items():
        _print(terminal, f"{model}: loss by size, {text}", *table(own))
        for sentence in words(own):
            terminal.say(sentence)
    return plot(cells, output.with_suffix(".svg"))


def _print(terminal: Terminal, title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        shown.add_column(name, justify="right" if number else "left")
    for row in rows:
        shown.add_row(*row)
    terminal.console.print(shown, soft_wrap=True)
