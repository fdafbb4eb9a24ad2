"""ALPS: ADMM whose penalty rises until the mask settles, then least squares on that mask (Meng et al., 2024).

min ‖X(W - D)ᵀ‖² over D with the pattern: B fits, D projects B + V/rho on the pattern, V is the dual. Every third
iteration rho rises, the more the more of the mask has moved; when nothing moves any more the mask stands.

The published code takes an eigendecomposition in float64 and builds an n³ inverse every third iteration; here a Cholesky
inverse is taken when rho moved, and the closing conjugate gradients need one product a step instead of three.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.numerics.linalg import DAMPING, Scaled, masked_least_squares, scaled
from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Gram
from llmprune.solvers.base import Solution

statistic = Gram
stackable = False  # the penalty follows how much of the whole mask changed
batched = False
true_sequential = True
products = 30
RHO, CHECK = 0.1, 3  # the first penalty; iterations between two changes of it
ITERATIONS, EARLIEST, SETTLED = 300, 30, 3e-4  # at most; from which a nearly still mask ends it; how still, of those kept
STEPS = 10  # of conjugate gradients
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the kept that moved -> factor of rho
_RESTARTS = 5


def solve(w: Tensor, stat: Gram, pattern: Pattern) -> Solution:
    h = scaled(stat.mean(), DAMPING)
    dense = h.into(w)
    mask, iterations = _search(dense, h, pattern)
    fit = masked_least_squares(h.matrix, dense, mask, dense, steps=STEPS)
    return Solution(h.back(fit.weight), mask, {"iterations": iterations, "residual": fit.residual})


@dataclass(slots=True)
class Alternation:
    """The state of ADMM on `dense` (out, in), in weights of unit diagonal: D (projected), V (dual) and the mask.

    `product` is `dense` times the Gram that the inverses given to `step` are of.
    """

    pattern: Pattern
    product: Tensor
    projected: Tensor
    dual: Tensor
    mask: Tensor

    def __init__(self, dense: Tensor, product: Tensor, pattern: Pattern) -> None:
        self.pattern, self.product, self.projected = pattern, product, dense
        self.dual, self.mask = dense.new_zeros(dense.shape), pattern.keep(dense.abs())

    def step(self, inverse: Tensor, rho: float) -> None:
        """Fit, project and correct the dual once; `inverse` is (H + rho I)^-1."""
        fitted = (self.product - self.dual).add_(self.projected, alpha=rho) @ inverse
        wanted = fitted.add(self.dual, alpha=1 / rho)
        self.mask = self.pattern.keep(wanted.abs())
        self.projected = wanted.mul_(self.mask)  # several times faster than masked_fill
        self.dual.add_(fitted.sub_(self.projected), alpha=rho)


def _search(dense: Tensor, h: Scaled, pattern: Pattern) -> tuple[Tensor, int]:
    """The mask of `dense` (out, in), in weights of unit diagonal, and the iterations it took."""
    product, rho, total = dense @ h.matrix, RHO, 0
    for _ in range(_RESTARTS):
        admm = Alternation(dense, product, pattern)
        iterations, moved = _settle(admm, h, rho)
        total += iterations
        if moved:
            break
        rho /= 5  # the first mask never changed: the penalty was too strong from the start
    return admm.mask, total


def _settle(admm: Alternation, h: Scaled, rho: float) -> tuple[int, bool]:
    """Raise the penalty from `rho` until the mask stands; returns the iterations, and whether the mask ever moved."""
    kept, moved = max(int(admm.mask.sum()), 1), False
    inverse, reference = h.inverse(rho), admm.mask
    for iteration in range(1, ITERATIONS + 1):
        admm.step(inverse, rho)
        if iteration % CHECK:
            continue
        change = int((admm.mask ^ reference).sum()) / kept
        reference = admm.mask
        if change == 0 or (iteration >= EARLIEST and change < SETTLED):
            return iteration, moved
        moved = True
        rho *= next(factor for least, factor in _GROWTH if change > least)
        inverse = h.inverse(rho)
    return ITERATIONS, moved
