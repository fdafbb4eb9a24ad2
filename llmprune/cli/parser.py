"""The command line: options, help and what is said of mistakes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from llmprune.base.errors import InputError, unknown
from llmprune.base.version import __version__
from llmprune.cli.commands import COMMANDS, DEFAULT
from llmprune.cli.terminal import Terminal


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as every other bad input is reported."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Options by name, those that were given or have a default.

        Raises:
            InputError: a flag, command or argument is unknown; near matches are listed.
        """
        known, rest = self.parse_known_args(arguments)
        if rest:
            flags = [string for action in self._actions for string in action.option_strings]
            if rest[0].startswith("-"):
                raise unknown("flag", rest[0].split("=")[0], flags)
            if rest[0] in COMMANDS.names():
                raise InputError(f"{rest[0]!r} is a command, which comes first: llmprune {rest[0]} ...")
            if self.prog == "llmprune":
                raise unknown("command", rest[0], COMMANDS.names())
            raise InputError(f"unexpected argument {rest[0]!r}; see {self.prog} --help")
        return {name: value for name, value in vars(known).items() if value is not None}


def _parser(prog: str, description: str, epilog: str) -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    return Parser(prog=prog, description=description, epilog=epilog, formatter_class=raw, allow_abbrev=False)


def command_parser(name: str) -> Parser:
    """Of `llmprune NAME ...`."""
    command = COMMANDS.get(name)
    summary = f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}."
    parser = _parser(f"llmprune {name}", summary, f"example: {command.EXAMPLE}")
    declare(name, parser)
    return parser


def main_parser() -> Parser:
    """Of `llmprune ...` without the name of a command."""
    parser = _parser("llmprune", "Prune a Hugging Face language model after training, block by block.", _epilog())
    parser.add_argument("--version", action="version", version=f"llmprune {__version__}")
    parser.add_argument("--print-completion", metavar="SHELL", help="print a script that completes llmprune in bash, zsh, ...")
    declare(DEFAULT, parser)
    return parser


def declare(name: str, parser: argparse.ArgumentParser) -> None:
    """All options of a command: its own, and what all share."""
    COMMANDS.get(name).add(parser)
    Terminal.add(parser)


def others() -> list[str]:
    """All commands but the one that is meant where none is named."""
    return [name for name in COMMANDS.names() if name != DEFAULT]


def _epilog() -> str:
    width = max(map(len, others()))
    lines = [f"  llmprune {name:<{width}}  {COMMANDS.get(name).SUMMARY}" for name in others()]
    return "\n".join(
        [
            "other commands (llmprune NAME --help):",
            *lines,
            "",
            "exit codes: 0 done, 1 a check failed, 2 bad input, 3 the machine, the network or the Hub failed, 130 interrupted",
            "",
            f"example: {COMMANDS.get(DEFAULT).EXAMPLE}",
        ]
    )
