"""The one error a user can cause, in one line; near matches for a mistyped name; paths as users write them."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do. The command exits with code 2 on it."""


class MachineError(InputError):
    """This machine, the network or one in it failed: no input is to blame. The command exits with code 3 on it."""


class LostProcess(InputError):
    """Another of the processes that share the run has ended; the error that matters is its own."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a `name` that is not among the `known` ones, nearest first."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} {name!r}; {hint}")


def reason(error: BaseException, limit: int = 160) -> str:
    """What an exception says, in one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def user_path(text: str | Path, what: str) -> Path:
    """A path as the user wrote it, `~` expanded.

    Raises:
        InputError: no file could have that name.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
        path.resolve()
        str(path).encode()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{what} {str(text)[:80]!r} is no usable path: {reason(error)}") from None
    if not str(text):
        raise InputError(f"{what} is empty: name a path")
    return path


def user_folder(text: str | Path, what: str) -> Path:
    """A folder as the user named it, `~` expanded.

    Raises:
        InputError: there is none.
    """
    path = user_path(text, what)
    if not path.is_dir():
        raise InputError(f"{what} {text} is a file: give the folder" if path.exists() else f"{what} {text} does not exist")
    return path


def denied(error: OSError, text: str) -> InputError:
    """The error for what the system refused: the machine's where room or the hardware is what it lacks."""
    lacking = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EROFS)
    return (MachineError if error.errno in lacking else InputError)(text)


@contextmanager
def plain_errors(hint: str = "lower --batch-size, --samples or --seqlen") -> Iterator[None]:
    """Say in one line what the machine denied: a file, disk space or memory, and for memory what may help."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise denied(error, f"cannot read or write {where}{error.strerror or reason(error)}") from None
    except MemoryError:
        raise MachineError(f"out of memory; {hint}") from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        raise MachineError(f"out of memory; {hint} ({reason(error)})") from None
