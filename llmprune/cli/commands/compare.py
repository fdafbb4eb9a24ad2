"""`llmprune compare`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from llmprune.base.files import file_to_write
from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "prune models by several methods to several patterns, and print the table that papers print"
EXAMPLE = "llmprune compare llama --methods wanda sparsegpt balanced --sparsity 2:4 50% --output compare.json"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="bundled names, folders or Hub ids")
    parser.add_argument("--methods", nargs="+", metavar="M", help="methods and presets (default: all)")
    parser.add_argument("--sparsity", nargs="+", metavar="S", help="patterns (default: 2:4 4:8 50%% 60%% 70%%)")
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
    from rich.table import Table

    from llmprune.reports.comparison import PATTERNS, papers_table
    from llmprune.reports.comparison_plot import plot
    from llmprune.runs.compare import CHOICES, compare

    rest = {name: options[name] for name in ("seeds", "text", "samples", "seqlen", "windows", "device")}
    chosen = {"methods": options.get("methods", CHOICES), "patterns": options.get("sparsity", PATTERNS)}
    cells = compare(options["models"], output, **chosen, **rest, tell=terminal.say)
    draws = ", mean ± standard deviation of calibration draws" if any(cell["seed"] for cell in cells) else ""
    for model, header, rows in papers_table(cells):
        table = Table(title=f"{model}: token perplexity, held-out {options['text']}{draws}", title_justify="left")
        for name in header:
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in rows:
            table.add_row(*row)
        terminal.console.print(table, soft_wrap=True)
    drawn = plot(cells, output.with_suffix(".svg"))
    terminal.say(f"wrote {output}, {output.with_suffix('.md')}" + (f", {output.with_suffix('.svg')}" if drawn else ""))
    return Outcome({"cells": cells})
