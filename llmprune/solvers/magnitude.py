"""Magnitude pruning: drop the smallest weights of each matrix (Han et al., 2015). Needs no calibration, no update."""

from __future__ import annotations

from torch import Tensor

from llmprune.patterns import Pattern
from llmprune.solvers.base import Solution, masked
from llmprune.stats import TokenCount

statistic = TokenCount
stackable = batched = True
true_sequential = False  # it does not look at inputs


def solve(w: Tensor, stat: TokenCount, pattern: Pattern) -> Solution:
    return masked(w, pattern.keep(w.abs()))
