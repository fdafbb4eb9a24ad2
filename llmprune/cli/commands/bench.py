"""`llmprune bench`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "time a packed model against itself dense, on this machine"
EXAMPLE = "llmprune bench llama-packed --json bench.json"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="packed, or dense and 2:4; or a Hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto is the checkpoint's own (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="that each layer is fed (default: 1 to 2048)")
    parser.add_argument("--batches", type=int, nargs="*", metavar="N", help="that the whole model is fed (default: 1 8 32)")
    parser.add_argument("--full", action="store_true", help="show all numbers of tokens, not only the fewest and the most")
    parser.add_argument("--compiled", action="store_true", help="time the dense model by torch.compile, too: takes minutes")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a prompt (default: %(default)s)")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    from llmprune.measure.bench import bench
    from llmprune.measure.bench_tables import show

    rest = {name: value for name, value in options.items() if name not in ("folder", "full")}
    found = bench(options["folder"], **rest, tell=lambda text: terminal.say(f"measuring {text}"))
    show(found, terminal.console, full=options["full"])
    return Outcome(found.as_dict())
