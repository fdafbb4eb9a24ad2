"""GPTQ (Frantar et al., 2022): error feedback, column by column, with the scales of round to nearest; zeros are put back."""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.stats import Gram
from llmprune.steps.quantise.feedback import fed_back
from llmprune.steps.quantise.grid import Grid, Quantised
from llmprune.steps.quantise.scales import largest

corrected = False


def quantise(target: Tensor, kept: Tensor | None, stat: Gram, grid: Grid) -> Quantised:
    return fed_back(target, kept, stat.factor.upper, grid, lambda w, mask, columns: largest(w, mask, grid))
