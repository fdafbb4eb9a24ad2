"""SparseGPT: drop weights column by column and let the later columns make up for it (Frantar & Alistarh, 2023).

With H^-1 = UᵀU, dropping w_j costs w_j² / U_jj², and the best correction of the columns after j is
-(w_j / U_jj) U_j,j+1: . An unstructured mask is chosen 128 columns at a time, each with its share of the sparsity; an
N:M mask a group at a time, from the weights as corrected so far.

The sweep works on Wᵀ, where a column is contiguous, and halves each block recursively, so that nearly all of the
correction is matrix products. It is the same arithmetic as one column at a time, in another order. A column is a dozen small
operations: on a GPU, where launching them takes longer than they do, the sweep of a block is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
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
_REPLAYS = 4  # blocks from which on recording one is worth it


def solve(w: Tensor, stat: Gram, pattern: Pattern) -> Solution:
    factor = stat.factor
    columns, rows = w.shape[1], w.shape[0]
    wt = w.masked_fill(factor.dead, 0).T.contiguous()
    whole = Columns(wt, torch.ones_like(wt, dtype=torch.bool), torch.zeros_like(wt), factor.upper)
    width = max(BLOCK // pattern.period, 1) * pattern.period
    replay: Replay | None = None
    for lo in range(0, columns, width):
        hi = min(lo + width, columns)
        block = whole.part(lo, hi)
        if pattern.period == 1:
            block.choose(pattern, start=lo * rows)
        if lo == width and _worth_recording(w, width):  # once the first block has loaded the kernels
            replay = record(block, pattern)
        if replay is None or not replay.run(block):
            block.sweep(pattern)
        whole.correct(lo, hi, columns)
    mask = whole.keep.T.contiguous()
    return Solution(wt.T.masked_fill(~mask, 0), mask, {"damping": factor.damping})


def _worth_recording(w: Tensor, width: int) -> bool:
    return w.is_cuda and w.shape[1] >= _REPLAYS * width


@dataclass(frozen=True, slots=True)
class Columns:
    """Some columns of the matrix, changed in place.

    Attributes:
        wt: their weights, (columns, out).
        keep: the mask.
        errors: of dropped weights, scaled.
        upper: their part of U, (columns, columns).
    """

    wt: Tensor
    keep: Tensor
    errors: Tensor
    upper: Tensor

    def part(self, lo: int, hi: int) -> Columns:
        """A view of columns lo to hi."""
        return Columns(self.wt[lo:hi], self.keep[lo:hi], self.errors[lo:hi], self.upper[lo:hi, lo:hi])

    def clone(self) -> Columns:
        return Columns(self.wt.clone(), self.keep.clone(), self.errors.clone(), self.upper.clone())

    def copy_(self, other: Columns) -> None:
        for own, its in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(its)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.wt, self.keep, self.errors, self.upper

    def choose(self, pattern: Pattern, *, start: int = 0) -> None:
        """Decide the mask from the weights as they are now."""
        score = (self.wt / self.upper.diagonal()[:, None]).square()
        self.keep.copy_(pattern.keep(score.T, start=start).T)

    def sweep(self, pattern: Pattern) -> None:
        """Drop and correct within these columns, all earlier ones being done. What is launched depends on shapes alone."""
        period, count = pattern.period, len(self.wt)
        if count <= max(_LEAF, period):
            return self._one_by_one(pattern)
        middle = max(count // 2 // period, 1) * period
        self.part(0, middle).sweep(pattern)
        self.correct(0, middle, count)
        self.part(middle, count).sweep(pattern)

    def correct(self, lo: int, hi: int, end: int) -> None:
        """Correct columns hi to end for what columns lo to hi lost."""
        self.wt[hi:end].addmm_(self.upper[lo:hi, hi:end].T, self.errors[lo:hi], alpha=-1)

    def _one_by_one(self, pattern: Pattern) -> None:
        period, diagonal = pattern.period, self.upper.diagonal()
        for j in range(len(self.wt)):
            if period > 1 and j % period == 0:
                self.part(j, j + period).choose(pattern)
            torch.div(self.wt[j].masked_fill(self.keep[j], 0), diagonal[j], out=self.errors[j])
            self.wt[j + 1 :].addr_(self.upper[j, j + 1 :], self.errors[j], alpha=-1)


@dataclass(frozen=True, slots=True)
class Replay:
    """The sweep of a block, recorded on `static`; `again` repeats what was recorded."""

    static: Columns
    again: Callable[[], None]

    def run(self, block: Columns) -> bool:
        """Sweep `block`, if it is as wide as what was recorded."""
        if block.wt.shape != self.static.wt.shape:
            return False
        self.static.copy_(block)
        self.again()
        block.copy_(self.static)
        return True


def record(block: Columns, pattern: Pattern) -> Replay | None:
    """The sweep of blocks like this one as a CUDA graph; None where it cannot be recorded. `block` stays as it is."""
    static = block.clone()
    try:
        with torch.cuda.device(block.wt.device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                static.sweep(pattern)
    except RuntimeError:
        return None
    return Replay(static, graph.replay)
