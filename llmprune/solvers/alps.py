"""ALPS: ADMM whose penalty rises until the mask settles, then least squares on that mask (Meng et al., 2024).

min ‖X(W - D)ᵀ‖² over D with the pattern: B fits, D projects B + V/rho on the pattern, V is the dual. Every third
iteration rho rises, the more the more of the mask has moved; when nothing moves any more the mask stands.

The published code takes an eigendecomposition in float64 and builds an n³ inverse every third iteration; here a Cholesky
inverse is taken when rho moved, and the closing conjugate gradients need one product a step instead of three.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.linalg import DAMPING, Scaled, masked_least_squares, scaled
from llmprune.patterns import Pattern
from llmprune.solvers.base import Solution
from llmprune.stats import Gram

statistic = Gram
RHO, CHECK = 0.1, 3  # the first penalty; iterations between two changes of it
ITERATIONS, EARLIEST, SETTLED = 300, 30, 3e-4  # at most; from which a nearly still mask ends it; how still, of those kept
STEPS = 10  # of conjugate gradients
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the kept that moved -> factor of rho
_RESTARTS = 5


def solve(w: Tensor, stat: Gram, pattern: Pattern) -> Solution:
    h = scaled(stat.mean(), DAMPING)
    dense = (w * h.scale).masked_fill_(h.dead, 0)
    mask, iterations = search(dense, h, pattern)
    fit = masked_least_squares(h.matrix, dense, mask, dense, steps=STEPS)
    return Solution(fit.weight / h.scale, mask, {"iterations": iterations, "residual": fit.residual})


def search(dense: Tensor, h: Scaled, pattern: Pattern) -> tuple[Tensor, int]:
    """The mask of `dense` (out, in), in unit-diagonal weights, and the iterations it took."""
    rho, total = RHO, 0
    for _ in range(_RESTARTS):
        admm = _Admm(dense, h, pattern, rho)
        total += admm.run()
        if admm.moved:
            break
        rho /= 5  # the first mask never changed: the penalty was too strong from the start
    return admm.mask, total


@dataclass(slots=True)
class _Admm:
    """State of one run: D (projected), V (dual) and the mask, all (out, in)."""

    h: Scaled
    pattern: Pattern
    rho: float
    product: Tensor
    projected: Tensor
    dual: Tensor
    mask: Tensor
    moved: bool

    def __init__(self, dense: Tensor, h: Scaled, pattern: Pattern, rho: float) -> None:
        self.h, self.pattern, self.rho, self.moved = h, pattern, rho, False
        self.product, self.dual = dense @ h.matrix, dense.new_zeros(dense.shape)
        self.mask = pattern.keep(dense.abs())
        self.projected = dense.clone()

    def run(self) -> int:
        kept = max(int(self.mask.sum()), 1)
        inverse, reference = self.h.inverse(self.rho), self.mask
        for iteration in range(1, ITERATIONS + 1):
            self.step(inverse)
            if iteration % CHECK:
                continue
            change = int((self.mask ^ reference).sum()) / kept
            reference = self.mask
            if change == 0 or (iteration >= EARLIEST and change < SETTLED):
                return iteration
            self.moved = True
            self.rho *= next(factor for least, factor in _GROWTH if change > least)
            inverse = self.h.inverse(self.rho)
        return ITERATIONS

    def step(self, inverse: Tensor) -> None:
        fitted = (self.product - self.dual).add_(self.projected, alpha=self.rho) @ inverse
        wanted = fitted.add(self.dual, alpha=1 / self.rho)
        self.mask = self.pattern.keep(wanted.abs())
        self.projected = wanted.masked_fill(~self.mask, 0)
        self.dual.add_(fitted.sub_(self.projected), alpha=self.rho)
