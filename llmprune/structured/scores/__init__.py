"""Ways to choose which heads or neurons stay, one file each. A file `name.py` here *is* the score `name`: see `base.Score`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from llmprune.errors import unknown

if TYPE_CHECKING:
    from llmprune.structured.scores.base import Score


def names() -> list[str]:
    """The scores there are. Reads file names only: nothing is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def load(name: str) -> Score:
    """The score called `name`.

    Raises:
        InputError: there is none; near matches are listed.
    """
    if name not in names():
        raise unknown("score", name, names())
    return importlib.import_module(f"{__name__}.{name}")
