"""The protocol of a command: a module with its options and what it does.

What is heavy is imported in `run`: help must not wait for torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llmprune.cli.terminal import Terminal


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did.

    Attributes:
        done: what `--json` writes; None: another process of the run writes it.
        code: the exit code: 0 done, 1 a check failed.
    """

    done: Mapping[str, Any] | None
    code: int = 0


class Command(Protocol):
    """What every module of this package has, `base` aside."""

    SUMMARY: str  # one line
    EXAMPLE: str

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        ...

    def run(self, options: Mapping[str, Any], terminal: Terminal) -> Outcome:
        """Do it; `options` has those that were given or have a default."""
        ...
