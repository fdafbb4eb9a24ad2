"""The command's further words, one file each: `llmprune NAME ...`.

A file has `SUMMARY` (one line), `EXAMPLE`, `add(parser)`, which declares its options, and `run(options, terminal)`, which does
the work. What is heavy is imported in `run`: help must not wait for torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from llmprune.cli.terminal import Terminal

NAMES = ("eval", "compare", "report", "verify", "pack", "unpack", "bench", "push")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did.

    Attributes:
        done: what `--json` writes.
        code: the exit code: 0 done, 1 a check failed.
    """

    done: Mapping[str, Any]
    code: int = 0


class Command(Protocol):
    """What a file in this package has."""

    SUMMARY: str
    EXAMPLE: str

    def add(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: Mapping[str, Any], terminal: Terminal) -> Outcome: ...


def load(name: str) -> Command:
    """The command called `name`."""
    return cast(Command, import_module(f"llmprune.cli.commands.{name}"))


def declare(command: Command, parser: argparse.ArgumentParser) -> None:
    """All options of a command: its own, and what all share."""
    command.add(parser)
    Terminal.add(parser)
