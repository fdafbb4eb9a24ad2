"""`llmprune recover`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from llmprune.cli.commands.base import Outcome, showing
from llmprune.cli.commands.prune import add_fields
from llmprune.cli.terminal import Terminal, is_first
from llmprune.job.recovery import RecoverConfig

SUMMARY = "train what pruning left of a model, its zeros kept"
EXAMPLE = "llmprune recover llama-2of4-balanced --tokens 1M"


def add(parser: argparse.ArgumentParser) -> None:
    """The fields of `RecoverConfig`."""
    model, *rest = dataclasses.fields(RecoverConfig)
    parser.add_argument("model", metavar="DIR", help=model.metadata["help"])
    add_fields(parser, rest)


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    rest = {name: value for name, value in options.items() if name in RecoverConfig.__dataclass_fields__}
    RecoverConfig.create(rest)  # before torch is imported
    shown = showing(terminal)
    from llmprune.runs.recover import recover

    with shown as progress:
        result = recover(rest.pop("model"), progress=progress, **rest)
    return Outcome({"output": result.output, **result.record.as_dict()} if is_first() else None)
