"""Cells of a page's tables: a value to sort by, and how it is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmprune.base.words import count

NONE = "not measured"
Cell = dict[str, Any]


def calibration_text(text: dict[str, Any]) -> str:
    """A record's `calibration` in words."""
    return f"{count(text['samples'], 'window')} of {text['seqlen']} tokens of {text['text']}, seed {text['seed']}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> dict[str, Any]:
    """Of rows of cells."""
    return {"columns": list(columns), "rows": [list(row) for row in rows]}


def cell(value: float | None, show: Callable[[Any], str], missing: str = NONE) -> Cell:
    """A number and how it is shown."""
    return {"value": value, "text": missing if value is None else show(value)}


def text_cell(text: str) -> Cell:
    return {"value": text, "text": text}
