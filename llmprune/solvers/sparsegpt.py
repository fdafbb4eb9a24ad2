"""SparseGPT: drop weights column by column and let the later columns make up for it (Frantar & Alistarh, 2023).

With H^-1 = UᵀU, dropping w_j costs w_j² / U_jj², and the best correction of the columns after j is
-(w_j / U_jj) U_j,j+1: . An unstructured mask is chosen 128 columns at a time, each with its share of the sparsity; an
N:M mask a group at a time, from the weights as corrected so far.

The sweep works on Wᵀ, where a column is contiguous, and halves each block recursively, so that nearly all of the
correction is matrix products. It is the same arithmetic as one column at a time, in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import Gram
from llmprune.solvers.base import Solution

statistic = Gram
stackable = True
batched = False
true_sequential = True
products = 1
BLOCK = 128  # columns an unstructured mask is chosen over, as published
_LEAF = 16  # columns swept one at a time


def solve(w: Tensor, stat: Gram, pattern: Pattern) -> Solution:
    factor = stat.factor
    columns, rows = w.shape[1], w.shape[0]
    sweep = _Sweep(w.masked_fill(factor.dead, 0).T.contiguous(), factor.upper, pattern)
    width = max(BLOCK // pattern.period, 1) * pattern.period
    for lo in range(0, columns, width):
        hi = min(lo + width, columns)
        if pattern.period == 1:
            sweep.choose(lo, hi, start=lo * rows)
        sweep.run(lo, hi)
        sweep.correct(lo, hi, columns)
    mask = sweep.keep.T.contiguous()
    return Solution(sweep.wt.T.masked_fill(~mask, 0), mask, {"damping": factor.damping})


@dataclass(slots=True)
class _Sweep:
    """Weights `wt`, the mask `keep` and the scaled `errors` of dropped weights, all (in, out)."""

    wt: Tensor
    upper: Tensor
    pattern: Pattern
    keep: Tensor
    errors: Tensor
    diagonal: list[float]

    def __init__(self, wt: Tensor, upper: Tensor, pattern: Pattern) -> None:
        self.wt, self.upper, self.pattern = wt, upper, pattern
        self.keep = torch.ones_like(wt, dtype=torch.bool)
        self.errors = torch.zeros_like(wt)
        self.diagonal = upper.diagonal().tolist()

    def choose(self, lo: int, hi: int, *, start: int = 0) -> None:
        """Decide the mask of columns lo to hi from the weights as they are now."""
        score = (self.wt[lo:hi] / self.upper.diagonal()[lo:hi, None]).square()
        self.keep[lo:hi] = self.pattern.keep(score.T, start=start).T

    def run(self, lo: int, hi: int) -> None:
        """Drop and correct within columns lo to hi, all earlier columns being done."""
        period = self.pattern.period
        if hi - lo <= max(_LEAF, period):
            self._columns(lo, hi)
            return
        middle = lo + max((hi - lo) // 2 // period, 1) * period
        self.run(lo, middle)
        self.correct(lo, middle, hi)
        self.run(middle, hi)

    def correct(self, lo: int, hi: int, end: int) -> None:
        """Correct columns hi to end for what columns lo to hi lost."""
        self.wt[hi:end].addmm_(self.upper[lo:hi, hi:end].T, self.errors[lo:hi], alpha=-1)

    def _columns(self, lo: int, hi: int) -> None:
        period = self.pattern.period
        for j in range(lo, hi):
            if period > 1 and j % period == 0:
                self.choose(j, j + period)
            torch.div(self.wt[j].masked_fill(self.keep[j], 0), self.diagonal[j], out=self.errors[j])
            self.wt[j + 1 : hi].addr_(self.upper[j, j + 1 : hi], self.errors[j], alpha=-1)
