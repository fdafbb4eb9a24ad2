"""Annealed ADMM, our own: ALPS's alternation under a penalty that rises by a fixed plan, then least squares on the mask.

A low penalty explores masks, a high one settles on one. ALPS (Meng et al., 2024) raises it by how much of the mask moves,
and stops as soon as nothing has moved for three iterations, which on small or nearly uncorrelated layers is too early.
Here it rises geometrically from 0.1 to 1 in units of the Gram's diagonal: six inverses and thirty products, always. On the
bundled model's layers that gives ALPS's error for less time (`eval/results`), and on problems small enough for brute force
masks much nearer to the best.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.linalg import Scaled, masked_least_squares
from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Gram
from llmprune.solvers.alps import Alternation
from llmprune.solvers.base import Solution

statistic = Gram
stackable = batched = True
true_sequential = True
products = 30
FIRST, LAST, LEVELS = 0.1, 1.0, 6  # penalties, rising geometrically
ITERATIONS = 5  # at each
DAMPING = 0.01  # of the unit diagonal
STEPS = 10  # of conjugate gradients


def solve(w: Tensor, stat: Gram, pattern: Pattern) -> Solution:
    h = stat.unit
    dense = h.into(w)
    admm = _anneal(dense, h, pattern)
    fit = masked_least_squares(h.matrix, dense, admm.mask, admm.projected, steps=STEPS)
    return Solution(h.back(fit.weight), admm.mask, {"residual": fit.residual})


def search(w: Tensor, stat: Gram, pattern: Pattern) -> Solution:
    h = stat.unit
    admm = _anneal(h.into(w), h, pattern)
    return Solution(h.back(admm.projected), admm.mask)


def _anneal(dense: Tensor, h: Scaled, pattern: Pattern) -> Alternation:
    """The alternation's last state, on weights of unit diagonal."""
    admm = Alternation(dense, (dense @ h.matrix).add_(dense, alpha=DAMPING), pattern)
    for level in range(LEVELS):
        rho = FIRST * (LAST / FIRST) ** (level / (LEVELS - 1))
        inverse = h.inverse(rho + DAMPING)
        for _ in range(ITERATIONS):
            admm.step(inverse, rho)
    return admm
