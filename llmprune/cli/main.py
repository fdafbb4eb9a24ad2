"""The command: `llmprune --model M --sparsity S` prunes; `llmprune NAME ...` is a file of `commands`. Help imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from llmprune.base.errors import InputError, LostProcess, MachineError, plain_errors, unknown, user_path
from llmprune.base.notation import DTYPES
from llmprune.base.version import __version__
from llmprune.base.words import command_line
from llmprune.cli import commands
from llmprune.cli.config_file import read_yaml
from llmprune.cli.terminal import Terminal, lasting_streams
from llmprune.job.options import LAYER_SCORES, PLACES, PruneConfig
from llmprune.job.recipes import QUALITIES, TARGETS
from llmprune.solvers import METHODS
from llmprune.steps.structured.scores import SCORES

_NAMES = {"method": METHODS.names, "score": SCORES.names}  # of options that name a file of ours
_CHOICES = {  # what else completion offers
    "quality": tuple(QUALITIES),
    "target": TARGETS,
    "dtype": DTYPES,
    "activations": PLACES,
    "layer_score": LAYER_SCORES,
    "device": ("auto", "cpu", "cuda"),
}
_PATHS = {  # where it offers files
    *("model", "models", "folder", "runs", "baseline", "output", "config", "json", "bench", "task_path"),
    *("calibration", "eval_text", "text", "texts"),
}
_TURN = 2  # seconds that a process waits for the first one to tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    0 done, 1 a check failed, 2 bad input, 3 the machine, the network or the Hub failed, 130 interrupted.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # unwinds, so that nothing half-written stays
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with lasting_streams() if argv is None else nullcontext(), plain_errors():
            if arguments and arguments[0] in commands.NAMES:
                return _command(arguments[0], arguments[1:])
            return _prune(arguments)
    except InputError as error:
        if _should_tell(error):
            print(f"llmprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 3 if isinstance(error, MachineError) else 2
    except KeyboardInterrupt:
        print("llmprune: interrupted", file=sys.stderr)
        return 130


def _should_tell(error: InputError) -> bool:
    """Of several processes one is enough: most mistakes are seen by all, and the launcher ends the others with the first.

    A mistake that only another process sees is told by that one, so the first waits when it has lost another.
    """
    lost, first = isinstance(error, LostProcess), _is_first()
    if lost or not first:
        time.sleep(2 * _TURN if lost else _TURN)
    return first or not lost


def _is_first() -> bool:
    """Whether this is the process, of those that a launcher started, that talks."""
    return os.environ.get("RANK", "0") == "0"


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as every other bad input is reported."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _prune(arguments: list[str]) -> int:
    parser = _prune_parser()
    if not arguments:
        parser.print_help()
        return 2
    options = _parse(parser, arguments)
    if shell := options.pop("print_completion", None):
        print(_completion(shell))
        return 0
    terminal = Terminal.take(options)
    path = options.pop("config", None)
    if path is not None:
        options = _under(options, _checked(read_yaml(user_path(path, "config")), path))
    config = PruneConfig.create({"output": "auto"} | options)
    terminal.settle_libraries()
    from llmprune.runs.checks import check_folders, check_names, finished

    check_names(config)
    if (done := finished(config)) is not None:
        return _finished(*done, config.push_to_hub, terminal)
    check_folders(config)
    first = _is_first()
    if first:
        terminal.say(f"llmprune {__version__}: loading torch and transformers ...")
    from llmprune.cli.console import Console
    from llmprune.job.progress import Progress
    from llmprune.runs import prune as pipeline

    shown = Console(terminal.console, each_site=terminal.verbose) if first and not terminal.quiet else nullcontext(Progress())
    with shown as progress:
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        result = pipeline.prune(values.pop("model"), progress=progress, **values)
    if first:
        terminal.write({"output": result.output, **result.record.as_dict()})
    return 0


def _finished(output: Path, record: dict[str, Any], push_to_hub: str | None, terminal: Terminal) -> int:
    """Say that there is nothing to do; push what is there, where that is asked for."""
    if not _is_first():
        return 0
    check = command_line("llmprune", "verify", output)
    terminal.say(
        f"{output} is complete: an earlier run of this command wrote it; `{check}` checks it, --overwrite makes it anew"
    )
    if push_to_hub is not None:
        commands.load("push").run({"folder": str(output), "repo_id": push_to_hub}, terminal)
    terminal.write({"output": output, **record})
    return 0


def _under(flags: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A file's values with the flags over them; --method also wins over the file's quality, and the other way round."""
    for named, other in (("method", "quality"), ("quality", "method")):
        if named in flags:
            values.pop(other, None)
    return values | flags


def _checked(values: dict[str, Any], path: str) -> dict[str, Any]:
    """A file's options, checked on their own so that an error names the file, as if flags said what else they need."""
    amounts = {} if "target_params" in values else {"neurons": "1", "layers": "1"}
    PruneConfig.create({"model": "-", "output": "-", "sparsity": "0.5", **amounts, **values}, where=path)
    return values


def _command(name: str, arguments: list[str]) -> int:
    """`llmprune NAME ...`, by its file in `commands`."""
    command = commands.load(name)
    parser = _Parser(
        prog=f"llmprune {name}",
        description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
        epilog=f"example: {command.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands.declare(command, parser)
    options = _parse(parser, arguments)
    terminal = Terminal.take(options)
    terminal.settle_libraries()
    outcome = command.run(options, terminal)
    terminal.write(outcome.done)
    return outcome.code


def _epilog() -> str:
    width = max(map(len, commands.NAMES))
    lines = [f"  llmprune {name:<{width}}  {commands.load(name).SUMMARY}" for name in commands.NAMES]
    return "\n".join(
        [
            "other commands (llmprune NAME --help):",
            *lines,
            "",
            "exit codes: 0 done, 1 a check failed, 2 bad input, 3 the machine, the network or the Hub failed, 130 interrupted",
            "",
            "example: llmprune --model llama --sparsity 2:4",
        ]
    )


def _prune_parser() -> _Parser:
    parser = _Parser(
        prog="llmprune",
        description="Prune a Hugging Face language model after training, block by block.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llmprune {__version__}")
    parser.add_argument("--print-completion", metavar="SHELL", help="print a script that completes llmprune in bash, zsh, ...")
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a YAML file; flags win over it")
    for field in dataclasses.fields(PruneConfig):
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%(default)s", str(field.default))
        if field.name in _NAMES:
            text += f": {', '.join(_NAMES[field.name]())}"
        common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": field.name}
        if str(field.type).startswith("bool"):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif str(field.type).startswith("tuple"):
            parser.add_argument(flag, nargs="+", action="extend", metavar=field.metadata["metavar"], **common)
        else:
            kind = int if str(field.type).startswith("int") else str
            parser.add_argument(flag, type=kind, metavar=field.metadata["metavar"] or field.name[0].upper(), **common)
    Terminal.add(parser)
    return parser


def _completion(shell: str) -> str:
    """A script for `shell` that completes the command, its options, names and files."""
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise unknown("shell", shell, shtab.SUPPORTED_SHELLS)
    whole = _prune_parser()
    words = whole.add_subparsers()
    parsers: list[argparse.ArgumentParser] = [whole]
    for name in commands.NAMES:
        command = commands.load(name)
        parsers.append(words.add_parser(name, help=command.SUMMARY))
        commands.declare(command, parsers[-1])
    for action in (action for parser in parsers for action in parser._actions):
        if action.dest in _PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in _NAMES:
            action.choices = _NAMES[action.dest]()
        else:
            action.choices = _CHOICES.get(action.dest, action.choices)
    return shtab.complete(whole, shell)


def _parse(parser: _Parser, arguments: list[str]) -> dict[str, Any]:
    known, rest = parser.parse_known_args(arguments)
    if rest:
        flags = [string for action in parser._actions for string in action.option_strings]
        if rest[0].startswith("-"):
            raise unknown("flag", rest[0].split("=")[0], flags)
        if parser.prog == "llmprune":
            raise unknown("command", rest[0], commands.NAMES)
        raise InputError(f"unexpected argument {rest[0]!r}; see {parser.prog} --help")
    return {name: value for name, value in vars(known).items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
