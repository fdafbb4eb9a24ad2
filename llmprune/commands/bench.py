"""`llmprune bench`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from llmprune.commands import file_to_write

SUMMARY = "time a 2:4 model against itself dense, on this machine"
EXAMPLE = "llmprune bench llama-packed --json bench.json"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="packed, or dense with zeros; or a Hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto is the checkpoint's own (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="that each layer is fed (default: 1 to 2048)")
    parser.add_argument("--batches", type=int, nargs="*", metavar="N", help="that the whole model is fed (default: 1 8 32)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured; - for standard output, without tables")


def run(options: Mapping[str, Any]) -> int:
    only, path = options.get("json") == "-", options.get("json")
    target = file_to_write(path) if path and not only else None
    from rich.console import Console

    from llmprune.bench import bench, show

    console = Console(highlight=False, stderr=only)
    rest = {name: value for name, value in options.items() if name not in ("folder", "json")}
    found = bench(options["folder"], **rest, tell=lambda text: console.print(f"measuring {text}"))
    text = json.dumps(found.as_dict(), indent=1)
    if only:
        print(text)
        return 0
    show(found, console)
    if target:
        target.write_text(text + "\n", encoding="utf-8")
    return 0
