"""`llmprune report`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from llmprune.commands import Outcome
from llmprune.errors import InputError, user_path
from llmprune.terminal import Terminal, file_to_write
from llmprune.words import count

SUMMARY = "one page about a run, or several side by side, to look at and share"
EXAMPLE = "llmprune report llama-2of4-balanced -o report.html"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder that llmprune wrote, packed or not, or its record")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="page to write (default: %(default)s)")
    parser.add_argument("--bench", action="append", metavar="FILE", help="what llmprune bench --json wrote; once for each RUN")
    parser.add_argument("--overwrite", action="store_true", help="replace the page and its JSON twin")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    names, benches = options["runs"], options.get("bench", [])
    target = file_to_write(options["output"])
    from llmprune.report import html, page, saved
    from llmprune.stream.publish import write_whole

    if len(names) > page.MOST:
        raise InputError(f"{count(len(names), 'run')}: too many to tell apart on one page, name at most {page.MOST}")
    runs = saved.read_runs(names, benches)
    inputs = [one.file for one in runs] + [user_path(name, "bench") for name in benches]
    terminal.check_apart(target, target.with_suffix(".json"))
    twin = html.check_target(target, inputs, overwrite=options["overwrite"])
    found = page.content(runs)
    write_whole({twin: html.as_json(found), target: html.render(found, twin.name)})
    terminal.say(f"wrote {target} and {twin}")
    return Outcome(found)
