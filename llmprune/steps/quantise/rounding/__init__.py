"""Ways to round a matrix to a grid, one file each. A file `name.py` here *is* the rounding `name`: see `base.Rounding`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.base.plugins import Plugins

if TYPE_CHECKING:
    from llmprune.steps.quantise.rounding.base import Rounding

ROUNDINGS: Plugins[Rounding] = Plugins(__name__, "rounding")
