"""Numbers in messages go with their nouns."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

import llmprune
from llmprune.base.words import count, size

ROOT = Path(llmprune.__file__).parent


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "problem", "0 problems"),
        (1, "block", "1 block"),
        (2, "calibration window", "2 calibration windows"),
        (1, "pruned matrix", "1 pruned matrix"),
        (28, "pruned matrix", "28 pruned matrices"),
        (2, "process", "2 processes"),
        (4_000_000, "parameter", "4,000,000 parameters"),
    ],
)
def test_one_is_one(number: int, noun: str, words: str) -> None:
    assert count(number, noun) == words


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (1, "1 byte"),
        (60_000, "59 KiB"),
        (8 * 2**20, "8.0 MiB"),
        (1120 * 2**20, "1,120 MiB"),
        (12.4 * 2**30, "12.4 GiB"),
        (300 * 2**30, "300 GiB"),
    ],
)
def test_bytes_are_shown_alike(nbytes: float, words: str) -> None:
    assert size(nbytes) == words


PLURALS = ("blocks", "matrices", "files", "windows", "problems", "runs", "layers", "processes", "documents", "weights", "steps")


def test_no_message_has_a_plural_of_its_own() -> None:
    """Where a message puts a plural right after a number, one would be `1 blocks`: `count` is for that."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        strings = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)]
        for value, rest in (pair for string in strings for pair in itertools.pairwise(string.values)):
            if isinstance(value, ast.FormattedValue) and isinstance(rest, ast.Constant):
                word = re.match(r" (\w+)", str(rest.value))
                found += [f"{path.name}:{value.lineno} {word[1]}"] if word and word[1] in PLURALS else []
    assert found == []
