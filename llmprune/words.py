"""How messages put things: numbers with the noun that they count."""

from __future__ import annotations

_PLURALS = {"matrix": "matrices", "process": "processes"}


def count(number: int, noun: str) -> str:
    """Such as `1 block`, `28 pruned matrices`, `1,024 windows`; `noun` is one, its last word the one that changes."""
    before, _, last = noun.rpartition(" ")
    word = last if number == 1 else _PLURALS.get(last, f"{last}s")
    return f"{number:,} {before}{' ' if before else ''}{word}"
