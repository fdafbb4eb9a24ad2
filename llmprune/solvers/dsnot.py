"""DSnoT: start from Wanda's mask and swap kept for dropped weights until a row's expected residual is small (Zhang et al.,
"Dynamic Sparse No Training", 2024). No update.

A row's residual is the sum of w_j E[x_j] over what it drops. Each cycle grows back the dropped weight that shrinks it
most, per variance of its input, and drops the kept one of least |w| ‖x‖ whose loss shrinks it too; under N:M both come
from one group. A row stops when its residual is below the threshold or changes sign.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Moments
from llmprune.solvers import wanda
from llmprune.solvers.base import Solution, masked

statistic = Moments
stackable = True
batched = False
true_sequential = False
products = 0
CYCLES, THRESHOLD = 50, 0.1  # as published; the threshold is in units of the layer's output
_NEVER = float("inf")


def solve(w: Tensor, stat: Moments, pattern: Pattern) -> Solution:
    groups = (-1, pattern.period if pattern.period > 1 else w.shape[1])
    mask = wanda.solve(w, stat, pattern).mask.unflatten(1, groups)
    effect = (w * stat.means()).unflatten(1, groups)  # on the output's mean, (out, groups, group)
    gain = (effect.flatten(1) / stat.variance().clamp_min(1e-12)).unflatten(1, groups)
    cost = (w.abs() * stat.rms()).unflatten(1, groups)
    residual = effect.masked_fill(mask, 0).sum((1, 2))
    sign, active, cycles = residual.sign(), residual.abs() > THRESHOLD, 0
    while cycles < CYCLES and bool(active.any()):
        toward = sign[:, None, None]
        grow = (toward * gain).masked_fill(mask, -_NEVER)
        drop = cost.masked_fill(~mask | (toward * effect >= 0), _NEVER)
        growth, grown = grow.max(2)
        loss, dropped = drop.min(2)
        best, group = growth.masked_fill(loss == _NEVER, -_NEVER).max(1)
        rows = (active & (best > 0)).nonzero().squeeze(1)
        if not len(rows):
            break
        at = group[rows]
        back, out = grown[rows, at], dropped[rows, at]
        mask[rows, at, back], mask[rows, at, out] = True, False
        residual[rows] += effect[rows, at, out] - effect[rows, at, back]
        active &= (best > 0) & (residual.abs() > THRESHOLD) & (residual.sign() == sign)
        cycles += 1
    return masked(w, mask.flatten(1))
