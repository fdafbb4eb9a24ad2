"""`llmprune pack`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

SUMMARY = "store 2:4 matrices as values and codes: 9/16 of their bytes in 16 bits"
EXAMPLE = "llmprune pack llama-2of4-balanced llama-packed"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a dense folder whose linear layers are 2:4, or a Hub id")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if llmprune wrote it")


def run(options: Mapping[str, Any]) -> int:
    from llmprune.sparse.convert import pack

    found = pack(options["folder"], options["output"], overwrite=options["overwrite"], tell=print)
    for name, why in found.dense.items():
        print(f"dense  {name}: {why}")
    print(
        f"{found.layers} matrices packed, {found.before:,} -> {found.after:,} bytes ({found.after / found.before:.1%}); "
        f"all tensors {found.total_before:,} -> {found.total_after:,} ({found.total_after / found.total_before:.1%})"
    )
    print(f"wrote {found.output}; next:")
    print(f"  llmprune bench {found.output}")
    print(f"  python -c 'import llmprune; llmprune.load(\"{found.output}\")'")
    return 0
