"""Magnitude pruning: drop the smallest weights of each matrix (Han et al., 2015). Needs no calibration, no update."""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import TokenCount
from llmprune.solvers.base import Solution, masked

statistic = TokenCount
stackable = batched = True
true_sequential = False  # it does not look at inputs
products = 0


def solve(w: Tensor, stat: TokenCount, pattern: Pattern) -> Solution:
    return masked(w, pattern.keep(w.abs()))
