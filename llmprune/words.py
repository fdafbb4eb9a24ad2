"""How messages put numbers: with the noun that they count; bytes."""

from __future__ import annotations

_PLURALS = {"matrix": "matrices", "process": "processes"}


def count(number: int, noun: str) -> str:
    """Such as `1 block`, `28 pruned matrices`, `1,024 windows`; `noun` is one, its last word the one that changes."""
    before, _, last = noun.rpartition(" ")
    word = last if number == 1 else _PLURALS.get(last, f"{last}s")
    return f"{number:,} {before}{' ' if before else ''}{word}"


def size(nbytes: int) -> str:
    """Bytes, as people read them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.1f} {name}"
    return f"{nbytes / 2**10:,.0f} KiB"
