"""Pruning methods, one file each. A file `name.py` here *is* the method `name`: see `base.Solver`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from llmprune.errors import unknown

if TYPE_CHECKING:
    from llmprune.solvers.base import Solver


def names() -> list[str]:
    """The methods there are. Reads file names only: nothing is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def load(name: str) -> Solver:
    """The solver called `name`.

    Raises:
        InputError: there is none; near matches are listed.
    """
    if name not in names():
        raise unknown("method", name, names())
    return importlib.import_module(f"{__name__}.{name}")
