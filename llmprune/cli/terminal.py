"""What all commands share at the terminal: `--json`, `--quiet`, `--verbose`, and where each of them writes."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import InputError, MachineError, denied
from llmprune.base.files import file_to_write

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
                return
            try:
                file_to_write(self.json).write_text(text, encoding="utf-8")
            except OSError as error:
                complete = f"; {done['output']} is complete" if done.get("output") else ""
                raise denied(error, f"cannot write {self.json}: {error.strerror}{complete}") from None

    def settle_libraries(self) -> None:
        """Keep transformers' and the Hub's own bars and advice out of what the user reads, unless asked for; and have torch
        begin large tensors at pages of 2 MiB, which leaves fewer holes in glibc's heap (docs/profile.md).
        """
        if not self.verbose:
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            watched = sys.stderr.isatty() and not self.quiet
            for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
                os.environ.setdefault(bars, "0" if watched else "1")
            if not watched:
                os.environ.setdefault("TQDM_DISABLE", "1")  # which tqdm reads once, when it is imported
            os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _Lasting(io.FileIO):
    """A standard stream that outlives its reader: once it cannot be written, what comes is dropped and the work goes on.

    Attributes:
        problem: why it could not be written, if that was not that the reader has gone.
    """

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.problem = None if isinstance(error, BrokenPipeError) else error
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Standard output and error may be closed by their readers (`llmprune ... | head`): the work is finished all the same.

    Raises:
        MachineError: standard output could not be written for another reason, such as a full disk; the work is done.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start, as by `>&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - it lives as long as the process
    raw = {name: _Lasting(getattr(sys, name).fileno(), "w", closefd=False) for name in ("stdout", "stderr")}
    for name, stream in raw.items():
        buffer = io.BufferedWriter(stream)
        # a file name may not fit the terminal's encoding
        text = io.TextIOWrapper(buffer, getattr(sys, name).encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, text)
    yield
    sys.stdout.flush()
    if raw["stdout"].problem is not None:
        raise MachineError(f"standard output cannot be written ({raw['stdout'].problem.strerror}); the work is done")


def is_first() -> bool:
    """Whether this is the process, of those that a launcher started, that talks."""
    return os.environ.get("RANK", "0") == "0"


def shares_store() -> bool:
    """Whether `torchrun` or `accelerate launch` started this process, which keep a store for all that they start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
