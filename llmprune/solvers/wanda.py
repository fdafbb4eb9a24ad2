"""Wanda: drop the smallest |weight| x input norm within each output row (Sun et al., 2023). No update."""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Moments
from llmprune.solvers.base import Solution, masked

statistic = Moments
stackable = True
batched = False
true_sequential = False
products = 0


def solve(w: Tensor, stat: Moments, pattern: Pattern) -> Solution:
    return masked(w, pattern.keep_rows(w.abs() * stat.rms()))
