"""Round to nearest: the scale of a group gives its largest weight the largest code."""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.stats import Gram
from llmprune.steps.quantise.grid import Grid, Quantised
from llmprune.steps.quantise.scales import largest

corrected = False


def quantise(target: Tensor, kept: Tensor | None, stat: Gram, grid: Grid) -> Quantised:
    scales = largest(target.unflatten(1, (-1, grid.group)), None if kept is None else kept.unflatten(1, (-1, grid.group)), grid)
    return Quantised(grid, grid.nearest(target / grid.spread(scales), kept), scales)
