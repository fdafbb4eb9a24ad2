"""RIA: drop by relative importance, |w| over its row's and its column's sums, x input norm^½ (Zhang et al., 2024).

Weights are compared over the whole matrix. Leaves out the paper's permutation of input channels for N:M. No update.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Moments
from llmprune.solvers.base import Solution, masked

statistic = Moments
stackable = False  # a weight's share of its column
batched = False
true_sequential = False
products = 0


def solve(w: Tensor, stat: Moments, pattern: Pattern) -> Solution:
    size = w.abs()
    least = 1e-30  # a row or column of zeros has no share to divide
    share = size / size.sum(0).clamp_min(least) + size / size.sum(1, keepdim=True).clamp_min(least)
    return masked(w, pattern.keep(share * stat.rms().sqrt()))
