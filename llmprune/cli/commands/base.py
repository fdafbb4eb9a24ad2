"""The protocol of a command: a module with its options and what it does.

What is heavy is imported in `run`: help must not wait for torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmprune.base.version import __version__
from llmprune.cli.terminal import Terminal, is_first

if TYPE_CHECKING:
    from llmprune.job.progress import Progress


def showing(terminal: Terminal) -> AbstractContextManager[Progress]:
    """What shows a run: on the first process, unless it is to be quiet. Says that torch is loaded, and loads it."""
    if is_first():
        terminal.say(f"llmprune {__version__}: loading torch and transformers ...")
    from llmprune.cli.console import Console
    from llmprune.job.progress import Progress

    shows = is_first() and not terminal.quiet
    return Console(terminal.console, each_site=terminal.verbose) if shows else nullcontext(Progress())


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
