"""`llmprune pack`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmprune.commands import Outcome
from llmprune.terminal import Terminal

SUMMARY = "store 2:4 matrices as values and codes: 9/16 of their bytes in 16 bits"
EXAMPLE = "llmprune pack llama-2of4-balanced llama-packed"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a dense folder whose linear layers are 2:4, or a Hub id")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if llmprune wrote it")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    from llmprune.models.resolve import spelled
    from llmprune.sparse.convert import pack

    found = pack(options["folder"], options["output"], overwrite=options["overwrite"], tell=terminal.say)
    for name, why in found.dense.items():
        terminal.say(f"dense  {name}: {why}")
    terminal.say(
        f"{found.layers} matrices packed, {found.before:,} -> {found.after:,} bytes ({found.after / found.before:.1%}); "
        f"all tensors {found.total_before:,} -> {found.total_after:,} ({found.total_after / found.total_before:.1%})"
    )
    terminal.say(f"wrote {found.output}; next:")
    name = spelled(found.output)
    terminal.say(f"  llmprune bench {shlex.quote(name)}")
    terminal.say(f"  python -c {shlex.quote(f'import llmprune; llmprune.load({json.dumps(name)})')}")
    return Outcome(asdict(found))
