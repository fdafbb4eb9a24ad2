"""ADMM pruning: alternate a least-squares fit with projection on the pattern (Boža, "Fast and Effective Weight Update
for Pruned Large Language Models", 2024).

In units in which the Gram H has unit diagonal, one inverse of H + 0.1 I + I serves all 20 iterations; the mask is chosen
anew in the first 15 (any N:M, where the published code knows 2:4 only) and then the weights settle on it.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Gram
from llmprune.solvers.base import Solution

statistic = Gram
stackable = batched = True
true_sequential = True
products = 30
DAMPING = 0.1  # of the unit diagonal, as published
RHO = 1.0
ITERATIONS, CHOOSING = 20, 15


def solve(w: Tensor, stat: Gram, pattern: Pattern) -> Solution:
    h = stat.unit
    inverse = h.inverse(RHO + DAMPING)
    dense = h.into(w)
    fitted, product = dense, (dense @ h.matrix).add_(dense, alpha=DAMPING)
    dual = dense.new_zeros(dense.shape)
    mask = pattern.keep(dense.abs())
    for iteration in range(ITERATIONS):
        projected = fitted + dual
        if iteration < CHOOSING:
            mask = pattern.keep(projected.abs())
        projected.mul_(mask)
        dual = dual + fitted - projected
        fitted = (product + RHO * (projected - dual)) @ inverse
    return Solution(h.back((fitted + dual).masked_fill_(~mask, 0)), mask)
