"""The command: `llmprune --model M --sparsity S` prunes; `llmprune NAME ...` is a file of `commands`. Help imports no torch."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

from llmprune.base.errors import InputError, LostProcess, MachineError, plain_errors
from llmprune.cli.commands import COMMANDS, DEFAULT
from llmprune.cli.parser import command_parser, main_parser
from llmprune.cli.terminal import Terminal, is_first, lasting_streams, shares_store

_TURN = 2  # seconds that a process waits for the first one to tell


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code.

    0 done, 1 a check failed, 2 bad input, 3 the machine, the network or the Hub failed, 130 interrupted.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # unwinds, so that nothing half-written stays
    try:
        with lasting_streams() if argv is None else nullcontext(), plain_errors():
            return _run(list(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        if _should_tell(error):
            print(f"llmprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 3 if isinstance(error, MachineError) else 2
    except KeyboardInterrupt:
        print("llmprune: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    named = bool(arguments) and arguments[0] in COMMANDS.names()
    name = arguments.pop(0) if named else DEFAULT
    parser = command_parser(name) if named else main_parser()
    if not named and not arguments:
        parser.print_help()
        return 2
    options = parser.read(arguments)
    if shell := options.pop("print_completion", None):
        from llmprune.cli.completion import completion

        print(completion(shell))
        return 0
    terminal = Terminal.take(options)
    terminal.settle_libraries()
    outcome = COMMANDS.get(name).run(options, terminal)
    if outcome.done is not None:
        terminal.write(outcome.done)
    return outcome.code


def _should_tell(error: InputError) -> bool:
    """Of several processes one is enough: most mistakes are seen by all, and the launcher ends the others with the first.

    A mistake that only another process sees is told by that one, so the first waits when it has lost another.
    """
    lost, first = isinstance(error, LostProcess), is_first()
    if lost or not first:
        time.sleep(2 * _TURN if lost else _TURN)
    if lost or not shares_store():
        return first or not lost
    from llmprune.base.processes import comes_first

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who comes first tells, though the launcher ends it with the others
    return comes_first(str(error))
