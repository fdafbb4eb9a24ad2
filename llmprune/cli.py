"""The command: `llmprune --model M --sparsity S` prunes; `verify`, `pack`, `unpack` and `bench` work on what that wrote.

Imports torch only to work.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from llmprune import __version__, solvers
from llmprune.config import PruneConfig, read_yaml
from llmprune.errors import InputError, LostProcess, plain_errors, unknown, user_path
from llmprune.structured import scores

_NAMES = {"method": solvers.names, "score": scores.names}
_TURN = 2  # seconds that a process waits for the first one to tell

_EPILOG = """\
other commands:
  llmprune verify DIR       re-check the sums and patterns of a folder that llmprune wrote
  llmprune pack DIR OUT     store 2:4 matrices as values and codes: 9/16 of their bytes in 16 bits
  llmprune unpack DIR OUT   the dense folder again, bit for bit
  llmprune bench DIR        time a 2:4 model against itself dense, on this machine

example: llmprune --model llama --sparsity 2:4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # unwinds, so that nothing half-written stays
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may not fit the terminal's encoding
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with plain_errors():
            command = _COMMANDS.get(arguments[0]) if arguments else None
            return command(arguments[1:]) if command else _prune(arguments)
    except InputError as error:
        if _should_tell(error):
            print(f"llmprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("llmprune: interrupted", file=sys.stderr)
        return 130


def _should_tell(error: InputError) -> bool:
    """Of several processes one is enough: most mistakes are seen by all, and the launcher ends the others with the first.

    A mistake that only another process sees is told by that one, so the first waits when it has lost another.
    """
    lost, first = isinstance(error, LostProcess), os.environ.get("RANK", "0") == "0"
    if lost or not first:
        time.sleep(2 * _TURN if lost else _TURN)
    return first or not lost


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
    path = options.pop("config", None)
    if path is not None:
        options = _under(options, _checked(read_yaml(user_path(path, "config")), path))
    config = PruneConfig.create({"output": "auto"} | options)

    _quiet_libraries()
    from llmprune import pipeline
    from llmprune.report.console import Console, Progress

    with Console() if os.environ.get("RANK", "0") == "0" else nullcontext(Progress()) as console:
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        pipeline.prune(values.pop("model"), progress=console, **values)
    return 0


def _under(flags: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A file's values with the flags over them; --method also wins over the file's quality, and the other way round."""
    for named, other in (("method", "quality"), ("quality", "method")):
        if named in flags:
            values.pop(other, None)
    return values | flags


def _checked(values: dict[str, Any], path: str) -> dict[str, Any]:
    """A file's options, checked on their own so that an error names the file."""
    PruneConfig.create({"model": "-", "sparsity": "0.5", **values}, where=path)
    return values


def _verify(arguments: list[str]) -> int:
    parser = _Parser(prog="llmprune verify", description="Re-check a folder that llmprune wrote.", allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR")
    options = _parse(parser, arguments)
    _quiet_libraries()
    from llmprune.integrity import verify

    found = verify(options["folder"])
    for problem in found.problems:
        print(f"FAILED  {problem}")
    print(f"{options['folder']}: {found.files} files and {found.matrices} matrices checked, {len(found.problems)} problems")
    return 1 if found.problems else 0


def _converter(name: str, description: str) -> _Parser:
    parser = _Parser(prog=f"llmprune {name}", description=description, allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if llmprune wrote it")
    return parser


def _pack(arguments: list[str]) -> int:
    options = _parse(_converter("pack", "Store the 2:4 matrices of a model as values and codes."), arguments)
    _quiet_libraries()
    from llmprune.sparse.convert import pack

    found = pack(options["folder"], options["output"], overwrite=options["overwrite"], tell=print)
    for name, why in found.dense.items():
        print(f"dense  {name}: {why}")
    print(
        f"{found.layers} matrices packed, {found.before:,} -> {found.after:,} bytes ({found.after / found.before:.1%}); "
        f"all tensors {found.total_before:,} -> {found.total_after:,} ({found.total_after / found.total_before:.1%})"
    )
    print(f"wrote {found.output}; next:")
    print(f"  llmprune bench {found.output}")
    print(f"  python -c 'import llmprune; llmprune.load(\"{found.output}\")'")
    return 0


def _unpack(arguments: list[str]) -> int:
    options = _parse(_converter("unpack", "Write the dense model that a packed folder stands for."), arguments)
    _quiet_libraries()
    from llmprune.sparse.convert import unpack

    found = unpack(options["folder"], options["output"], overwrite=options["overwrite"], tell=print)
    print(f"{found.layers} matrices unpacked; all tensors {found.total_before:,} -> {found.total_after:,} bytes")
    print(f"wrote {found.output}")
    return 0


def _bench(arguments: list[str]) -> int:
    parser = _Parser(
        prog="llmprune bench", description="Time a 2:4 model against itself dense, turn about.", allow_abbrev=False
    )
    parser.add_argument("folder", metavar="DIR", help="packed, or dense with zeros; or a Hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto is the checkpoint's own (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="that each layer is fed (default: 1 to 2048)")
    parser.add_argument("--batches", type=int, nargs="*", metavar="N", help="that the whole model is fed (default: 1 8 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write what was measured; - for standard output, without tables")
    options = _parse(parser, arguments)
    _quiet_libraries()
    path = options.pop("json", None)
    if path not in (None, "-") and not user_path(path, "file").resolve().parent.is_dir():
        raise InputError(f"cannot write {path}: its folder does not exist")
    from rich.console import Console

    from llmprune.bench import bench, show

    console = Console(highlight=False, stderr=path == "-")
    found = bench(options.pop("folder"), **options, tell=lambda text: console.print(f"measuring {text}"))
    text = json.dumps(found.as_dict(), indent=1)
    if path == "-":
        print(text)
        return 0
    show(found, console)
    if path:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return 0


_COMMANDS = {"verify": _verify, "pack": _pack, "unpack": _unpack, "bench": _bench}


def _prune_parser() -> _Parser:
    parser = _Parser(
        prog="llmprune",
        description="Prune a Hugging Face language model after training, block by block.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llmprune {__version__}")
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
    return parser


def _parse(parser: _Parser, arguments: list[str]) -> dict[str, Any]:
    known, rest = parser.parse_known_args(arguments)
    if rest:
        flags = [string for action in parser._actions for string in action.option_strings]
        if rest[0].startswith("-"):
            raise unknown("flag", rest[0].split("=")[0], flags)
        if parser.prog == "llmprune":
            raise unknown("command", rest[0], _COMMANDS)
        raise InputError(f"unexpected argument {rest[0]!r}; see {parser.prog} --help")
    return {name: value for name, value in vars(known).items() if value is not None}


def _quiet_libraries() -> None:
    """Keep transformers' and the Hub's own bars and advice out of what the user reads."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
