"""Error feedback under the mask, then refinement that never raises the loss: codes and scales in turn, and both at once.

Feedback begins from the weights that fit the target best on the mask. Coordinate descent on the codes and least squares for the
scales alternate; then codes are looked for by ADMM, which moves many at once, and the two follow once more.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.linalg import DAMPING, masked_least_squares, scaled
from llmprune.numerics.stats import Gram
from llmprune.steps.quantise.alternation import alternated
from llmprune.steps.quantise.descent import descended
from llmprune.steps.quantise.feedback import fed_back
from llmprune.steps.quantise.grid import Grid, Quantised
from llmprune.steps.quantise.scales import fitted, searched

corrected = True
_BEFORE, _AFTER, _SWEEPS = 3, 2, 3  # turns of codes and scales before and after ADMM; times through the columns in each


def quantise(target: Tensor, kept: Tensor | None, stat: Gram, grid: Grid) -> Quantised:
    unit = scaled(stat.mean(), DAMPING)
    gram = unit.matrix * unit.scale * unit.scale[:, None]
    start = target if kept is None else masked_least_squares(gram, target, kept, target).weight
    importance = gram.diagonal()

    def refined(found: Quantised, turns: int) -> Quantised:
        for _ in range(turns):
            found = fitted(descended(found, kept, target, gram, sweeps=_SWEEPS), target, gram)
        return found

    found = fed_back(start, kept, stat.factor.upper, grid, lambda w, mask, own: searched(w, mask, importance[own], grid))
    return refined(alternated(refined(found, _BEFORE), kept, target, gram, unit), _AFTER)
