"""`llmprune recover`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from llmprune.base.version import __version__
from llmprune.cli.commands.base import Outcome
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
    first = is_first()
    if first:
        terminal.say(f"llmprune {__version__}: loading torch and transformers ...")
    from llmprune.cli.console import Console
    from llmprune.job.progress import Progress
    from llmprune.runs.recover import recover

    shown = Console(terminal.console) if first and not terminal.quiet else nullcontext(Progress())
    with shown as progress:
        result = recover(rest.pop("model"), progress=progress, **rest)
    return Outcome({"output": result.output, **result.record.as_dict()} if first else None)
