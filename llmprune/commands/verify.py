"""`llmprune verify`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

SUMMARY = "re-check the sums and patterns of a folder that llmprune wrote"
EXAMPLE = "llmprune verify llama-2of4-balanced"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR")


def run(options: Mapping[str, Any]) -> int:
    from llmprune.integrity import verify

    found = verify(options["folder"])
    for problem in found.problems:
        print(f"FAILED  {problem}")
    print(f"{options['folder']}: {found.files} files and {found.matrices} matrices checked, {len(found.problems)} problems")
    return 1 if found.problems else 0
