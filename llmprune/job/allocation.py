"""Files that say which pattern each matrix gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmprune.base.errors import InputError
from llmprune.base.files import read_json
from llmprune.job.scan import Allocation
from llmprune.numerics.patterns import Pattern, parse

DENSE = "dense"


def read_allocation(path: Path) -> Allocation:
    """Patterns by a matrix's name, or by a glob over names, from a JSON object of texts such as 45%, 2:4 or dense.

    Raises:
        InputError: it is something else.
    """
    saved = read_json(path)
    if not saved or "matrices" in saved:
        raise InputError(f'{path} is no allocation: give a JSON object of patterns by name, such as {{"*.0.*": "45%"}}')
    found: dict[str, Pattern | None] = {}
    for name, text in saved.items():
        if not isinstance(text, (str, float)):
            raise InputError(f"{path}: {name} is {text!r:.40}: give a text such as 45%, 2:4 or dense")
        try:
            found[name] = None if text == DENSE else parse(text)
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from None
    return found


def as_texts(allocation: Allocation) -> Mapping[str, str]:
    """What `read_allocation` reads."""
    return {name: DENSE if pattern is None else str(pattern) for name, pattern in allocation.items()}
