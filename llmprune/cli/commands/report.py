"""`llmprune report`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from llmprune.base.files import file_to_write
from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "one page about a run, several side by side, or a scan, to look at and share"
EXAMPLE = "llmprune report llama-2of4-balanced -o report.html"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a folder that llmprune wrote, packed or not, or its record; or a scan's"
    )
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="page to write (default: %(default)s)")
    parser.add_argument("--bench", action="append", metavar="FILE", help="what llmprune bench --json wrote; once for each RUN")
    parser.add_argument("--overwrite", action="store_true", help="replace the page and its JSON twin")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    target = file_to_write(options["output"])
    terminal.check_apart(target, target.with_suffix(".json"))
    from llmprune.reports.html import report

    found = report(options["runs"], options["output"], benches=options.get("bench", []), overwrite=options["overwrite"])
    terminal.say(f"wrote {target} and {target.with_suffix('.json')}")
    return Outcome(found)
