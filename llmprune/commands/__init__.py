"""The command's further words, one file each: `llmprune NAME ...`.

A file has `SUMMARY` (one line), `EXAMPLE`, `add(parser)`, which declares its options, and `run(options)`, which does the work
and returns the exit code. What is heavy is imported in `run`: help must not wait for torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from llmprune.errors import InputError, user_path

NAMES = ("eval", "compare", "report", "verify", "pack", "unpack", "bench", "push")


class Command(Protocol):
    """What a file in this package has."""

    SUMMARY: str
    EXAMPLE: str

    def add(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: Mapping[str, Any]) -> int: ...


def load(name: str) -> Command:
    """The command called `name`."""
    return cast(Command, import_module(f"llmprune.commands.{name}"))


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
    return path
