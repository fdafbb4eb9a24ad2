"""How messages put things: counts with their noun, bytes, and commands that can be pasted as they are printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

_PLURALS = {"matrix": "matrices", "process": "processes"}


def count(number: int, noun: str) -> str:
    """Such as `1 block`, `28 pruned matrices`, `1,024 windows`; `noun` is one, its last word the one that changes."""
    before, _, last = noun.rpartition(" ")
    word = last if number == 1 else _PLURALS.get(last, f"{last}s")
    return f"{number:,} {before}{' ' if before else ''}{word}"


def size(nbytes: float) -> str:
    """Bytes, as people read them: such as `7.8 MiB`, `1,120 MiB`, `12.4 GiB`."""
    for least, unit, name in ((10 * 2**30, 2**30, "GiB"), (2**20, 2**20, "MiB"), (2**10, 2**10, "KiB")):
        if nbytes >= least:
            value = nbytes / unit
            return f"{value:.1f} {name}" if value < 100 else f"{value:,.0f} {name}"
    return count(int(nbytes), "byte")


def command_line(*words: str | Path) -> str:
    """The words as a POSIX shell reads them. A path that begins with a dash gets `./` before it: else it would be an option."""
    return shlex.join(f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words)


def literal(text: str | Path) -> str:
    """The text as Python reads it."""
    return json.dumps(str(text), ensure_ascii=False)
