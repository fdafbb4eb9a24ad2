"""`llmprune verify`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmprune.base.words import count
from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "re-check the sums and patterns of a folder that llmprune wrote"
EXAMPLE = "llmprune verify llama-2of4-balanced"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    from llmprune.output.verify import verify

    found = verify(options["folder"])
    for problem in found.problems:
        terminal.say(f"FAILED  {problem}")
    checked = f"{count(found.files, 'file')} and {count(found.matrices, 'matrix')} checked"
    terminal.say(f"{options['folder']}: {checked}, {count(len(found.problems), 'problem')}")
    return Outcome({"folder": options["folder"], **asdict(found)}, code=1 if found.problems else 0)
