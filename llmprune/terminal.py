"""What all commands share at the terminal: `--json`, `--quiet`, `--verbose`, and where each of them writes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError, user_path

if TYPE_CHECKING:
    from rich.console import Console

_STANDARD = "-"


@dataclass(frozen=True)
class Terminal:
    """How this call of the command talks.

    Attributes:
        json: the file for what was done, `-` for standard output, where nothing else is then written.
        quiet: say nothing but errors.
        verbose: say more, and let the libraries speak.
    """

    json: str | None = None
    quiet: bool = False
    verbose: bool = False

    @staticmethod
    def add(parser: argparse.ArgumentParser) -> None:
        """Declare the three options."""
        talk = parser.add_argument_group("what it says")
        talk.add_argument(
            "--json", metavar="FILE", help="write what was done; - for standard output, the rest on standard error"
        )
        volume = talk.add_mutually_exclusive_group()
        volume.add_argument("-q", "--quiet", action="store_true", help="errors only")
        volume.add_argument("-v", "--verbose", action="store_true", help="more lines, and what the libraries say")

    @classmethod
    def take(cls, options: dict[str, Any]) -> Terminal:
        """The three taken out of what was parsed.

        Raises:
            InputError: the file cannot be written.
        """
        found = cls(options.pop("json", None), options.pop("quiet", False), options.pop("verbose", False))
        if found.json not in (None, _STANDARD):
            file_to_write(found.json)
        return found

    def check_apart(self, *paths: Path) -> None:
        """The file for JSON must be none of those that the command itself writes.

        Raises:
            InputError: it is.
        """
        if self.json not in (None, _STANDARD):
            for path in paths:
                if file_to_write(self.json).resolve() == path.resolve():
                    raise InputError(f"--json {self.json} is what the command writes anyway: choose another file")

    @cached_property
    def console(self) -> Console:
        """For tables."""
        from rich.console import Console

        return Console(highlight=False, quiet=self.quiet, stderr=self.json == _STANDARD)

    def say(self, text: str) -> None:
        """A line."""
        if not self.quiet:
            print(text, file=sys.stderr if self.json == _STANDARD else sys.stdout, flush=True)

    def write(self, done: Mapping[str, Any]) -> None:
        """What was done, where `--json` asks for it."""
        if self.json is not None:
            text = json.dumps(done, indent=1, default=str) + "\n"
            if self.json == _STANDARD:
                sys.stdout.write(text)
            else:
                file_to_write(self.json).write_text(text, encoding="utf-8")

    def settle_libraries(self) -> None:
        """Keep transformers' and the Hub's own bars and advice out of what the user reads, unless asked for."""
        if not self.verbose:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
                os.environ.setdefault(bars, "0" if sys.stderr.isatty() and not self.quiet else "1")
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def file_to_write(text: str) -> Path:
    """A file that an option names, checked before the work that would fill it.

    Raises:
        InputError: it cannot be written.
    """
    path = user_path(text, "file")
    if not path.resolve().parent.is_dir():
        raise InputError(f"cannot write {text}: its folder does not exist")
    if path.is_dir():
        raise InputError(f"cannot write {text}: it is a folder")
    if any((path.resolve().parent / name).is_file() for name in ("config.json", "llmprune.json")):
        raise InputError(f"cannot write {text}: a model lies in its folder, which stays as it is; choose another")
    return path
