"""Pruning methods, one file each. A file `name.py` here *is* the method `name`: see `base.Solver`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.base.plugins import Plugins

if TYPE_CHECKING:
    from llmprune.solvers.base import Solver

METHODS: Plugins[Solver] = Plugins(__name__, "method")
