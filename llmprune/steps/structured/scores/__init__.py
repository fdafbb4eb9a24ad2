"""Ways to choose which heads or neurons stay, one file each. A file `name.py` here *is* the score `name`: see `base.Score`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.base.plugins import Plugins

if TYPE_CHECKING:
    from llmprune.steps.structured.scores.base import Score

SCORES: Plugins[Score] = Plugins(__name__, "score")
