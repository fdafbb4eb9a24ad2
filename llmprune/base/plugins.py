"""Modules of a package that are found by their names: a file `name.py` in it *is* the plugin `name`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Generic, TypeVar

from llmprune.base.errors import unknown

P = TypeVar("P")
_BASE = "base"


class Plugins(Generic[P]):
    """The plugins of a package.

    Args:
        package: its full name; `base.py` in it, which has the protocol, is none.
        kind: what messages call one of them.
    """

    def __init__(self, package: str, kind: str) -> None:
        self._package, self._kind = package, kind

    def names(self) -> list[str]:
        """Those there are. Reads file names only: nothing in them is imported."""
        path = importlib.import_module(self._package).__path__
        return sorted(module.name for module in pkgutil.iter_modules(path) if module.name != _BASE)

    def get(self, name: str) -> P:
        """The plugin called `name`.

        Raises:
            InputError: there is none; near matches are listed.
        """
        module = f"{self._package}.{name}"
        if (module not in sys.modules or name == _BASE) and name not in self.names():
            raise unknown(self._kind, name, self.names())
        return importlib.import_module(module)  # type: ignore[return-value]
