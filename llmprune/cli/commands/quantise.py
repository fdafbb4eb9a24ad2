"""`llmprune quantise`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from llmprune.cli.commands.base import Outcome, showing
from llmprune.cli.commands.prune import add_fields
from llmprune.cli.terminal import Terminal, is_first
from llmprune.job.options import PruneConfig

SUMMARY = "round what pruning left of a model to codes of 8, 4 or 3 bits, its zeros kept"
EXAMPLE = "llmprune quantise llama-2of4-balanced --bits 4"
OPTIONS = (
    *("bits", "group_size", "rounding", "calibration", "samples", "seqlen", "activations", "batch_size", "seed", "all_experts"),
    *("only", "skip", "eval_text", "output", "overwrite", "restart", "device", "dtype"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Those fields of `PruneConfig` that say how to round, calibrate and compute."""
    parser.add_argument("model", metavar="MODEL", help="a folder that llmprune wrote, or any other, a bundled name or a Hub id")
    add_fields(parser, [field for field in dataclasses.fields(PruneConfig) if field.name in OPTIONS])


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    rest: dict[str, Any] = {name: value for name, value in options.items() if name in OPTIONS}
    rest = {"bits": 4, "output": "auto", **rest}
    PruneConfig.create({"model": options["model"], **rest})  # before torch is imported
    shown = showing(terminal)
    from llmprune.runs.prune import quantise

    with shown as progress:
        result = quantise(options["model"], rest.pop("output"), progress=progress, **rest)
    return Outcome({"output": result.output, **result.record.as_dict()} if is_first() else None)
