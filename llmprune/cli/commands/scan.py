"""`llmprune scan`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from llmprune.cli.commands.base import Outcome, showing
from llmprune.cli.commands.prune import add_fields
from llmprune.cli.terminal import Terminal, is_first
from llmprune.job.options import PruneConfig

SUMMARY = "measure what each matrix loses at which sparsity, and propose how to spread one"
EXAMPLE = "llmprune scan llama --output llama-scan"
OPTIONS = (
    *("calibration", "samples", "seqlen", "activations", "batch_size", "seed", "all_experts", "only", "skip"),
    *("output", "overwrite", "restart", "device", "dtype"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Those fields of `PruneConfig` that say how to calibrate and compute."""
    parser.add_argument("model", metavar="MODEL", help="bundled name (llama), local folder, or Hub id")
    add_fields(parser, [field for field in dataclasses.fields(PruneConfig) if field.name in OPTIONS])


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    shown = showing(terminal)
    from llmprune.models.resolve import look_up
    from llmprune.runs.scan import scan, show

    rest = {name: value for name, value in options.items() if name in OPTIONS}
    rest.setdefault("output", f"{look_up(options['model']).name}-scan")
    with shown as progress:
        found = scan(options["model"], progress=progress, **rest)
    if not is_first():
        return Outcome(None)
    show(found, options["model"], rest["output"], terminal.console)
    return Outcome({"output": rest["output"], **found.as_dict()})
