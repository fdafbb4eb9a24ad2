"""Alternate a least-squares fit with rounding, until both agree: ADMM, as for masks (Boža, 2024), on mask and grid.

In units in which the Gram H has unit diagonal: B = (H + rho I)^-1 (H T + rho (D - V)) fits, D rounds B + V to the mask and the
grid, V += B - D. The penalty rho rises, so that in the end B and D are one. Scales stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.numerics.linalg import Scaled
from llmprune.steps.quantise.grid import Quantised
from llmprune.steps.quantise.loss import row_losses

RHO, GROWTH, EVERY, ITERATIONS = 0.1, 1.3, 5, 60  # the first penalty; by how much it grows, each so many iterations


def alternated(found: Quantised, kept: Tensor | None, target: Tensor, gram: Tensor, unit: Scaled) -> Quantised:
    """The codes of each row of the iteration at which it loses least, those of `found` included.

    Args:
        kept: (out, in) bool, False where the code is to be zero; None: nowhere.
        target: (out, in), the weights to imitate.
        gram: (in, in), by which losses are measured; `unit` is the same in units in which its diagonal is 1.
    """
    steps = found.grid.spread(found.scales) * unit.scale  # of the grid, in those units
    product = (target * unit.scale) @ unit.matrix
    rounded, dual = found.codes * steps, torch.zeros_like(target)
    codes, least, rho = found.codes, row_losses(found, target, gram), RHO
    inverse = unit.inverse(rho)
    for iteration in range(1, ITERATIONS + 1):
        wanted = (product + rho * (rounded - dual)) @ inverse
        wanted += dual
        new = found.grid.nearest(wanted / steps, kept)
        rounded = new * steps
        dual = wanted - rounded
        lost = row_losses(replace(found, codes=new), target, gram)
        codes, least = torch.where((lost < least)[:, None], new, codes), torch.minimum(lost, least)
        if iteration % EVERY == 0:
            rho, dual = rho * GROWTH, dual / GROWTH
            inverse = unit.inverse(rho)
    return replace(found, codes=codes)
