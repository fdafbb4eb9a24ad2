"""`llmprune pack`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmprune.base.words import command_line, count, literal
from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "store sparse matrices without their zeros: at 2:4 and 50%, 9/16 of their bytes in 16 bits"
EXAMPLE = "llmprune pack llama-2of4-balanced llama-packed"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a folder whose linear layers have zeros, quantised or not, or a Hub id")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if llmprune wrote it")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    from llmprune.formats.convert import pack
    from llmprune.models.resolve import spelled

    found = pack(options["folder"], options["output"], overwrite=options["overwrite"], tell=terminal.say)
    for name, why in found.dense.items():
        terminal.say(f"dense  {name}: {why}")
    packed = f"{count(found.layers, 'matrix')} packed"
    terminal.say(
        f"{packed}, {found.before:,} -> {found.after:,} bytes ({found.after / found.before:.1%}; "
        f"{8 * found.after / found.weights:.2f} bits a weight); "
        f"all tensors {found.total_before:,} -> {found.total_after:,} ({found.total_after / found.total_before:.1%})"
    )
    terminal.say(f"wrote {found.output}; next:")
    name = spelled(found.output)
    terminal.say(f"  {command_line('llmprune', 'bench', name)}")
    terminal.say(f"  {command_line('python', '-c', f'import llmprune; llmprune.load({literal(name)})')}")
    return Outcome(asdict(found))
