"""`llmprune unpack`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmprune.base.words import count
from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "the dense folder that a packed one stands for, bit for bit"
EXAMPLE = "llmprune unpack llama-packed llama-dense"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder that llmprune pack wrote")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if llmprune wrote it")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    from llmprune.formats.convert import unpack

    found = unpack(options["folder"], options["output"], overwrite=options["overwrite"], tell=terminal.say)
    terminal.say(f"{count(found.layers, 'matrix')} unpacked; all tensors {found.total_before:,} -> {found.total_after:,} bytes")
    terminal.say(f"wrote {found.output}")
    return Outcome(asdict(found))
