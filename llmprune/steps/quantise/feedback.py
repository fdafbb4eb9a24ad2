"""Error feedback: round column by column, and let the later columns make up for it (GPTQ, Frantar et al., 2022), under a mask.

With H^-1 = UᵀU, setting w_j to q_j costs (w_j - q_j)² / U_jj², and the best correction of the columns after j is
-((w_j - q_j) / U_jj) U_j,j+1: . What is pruned is set to zero in its turn, so that corrections which fell on it are passed on.
The scale of a group is chosen when its first column is reached, by the weights as corrected so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from llmprune.steps.quantise.grid import Grid, Quantised

_BLOCK = 128  # columns after which the rest is corrected at once


Choose: TypeAlias = Callable[[Tensor, "Tensor | None", slice], Tensor]  # scales (out,) of weights (out, columns) and their mask


def fed_back(w: Tensor, kept: Tensor | None, upper: Tensor, grid: Grid, choose: Choose) -> Quantised:
    """`w` (out, in) on the grid.

    Args:
        kept: (out, in) bool, False where the code is to be zero; None: nowhere.
        upper: U, (in, in).
        choose: the scales of a group.
    """
    wt = w.T.clone(memory_format=torch.contiguous_format)
    mask = None if kept is None else kept.T.contiguous()
    codes, scales = torch.empty_like(wt), wt.new_empty(len(wt) // grid.group, wt.shape[1])
    for group, lo in enumerate(range(0, len(wt), grid.group)):
        own = slice(lo, lo + grid.group)
        scales[group] = choose(wt[own].T, None if mask is None else mask[own].T, own)
        for start in range(lo, lo + grid.group, _BLOCK):
            _sweep(wt, mask, codes, scales[group], upper, slice(start, min(start + _BLOCK, lo + grid.group)), grid)
    return Quantised(grid, codes.T.contiguous(), scales.T.contiguous())


def _sweep(wt: Tensor, mask: Tensor | None, codes: Tensor, scale: Tensor, upper: Tensor, columns: slice, grid: Grid) -> None:
    """Round `columns` of one group, and correct those after them."""
    errors = torch.empty_like(wt[columns])
    for place, j in enumerate(range(columns.start, columns.stop)):
        codes[j] = grid.nearest(wt[j] / scale, None if mask is None else mask[j])
        errors[place] = (wt[j] - codes[j] * scale) / upper[j, j]
        wt[j + 1 : columns.stop].addr_(upper[j, j + 1 : columns.stop], errors[place], alpha=-1)
    wt[columns.stop :].addmm_(upper[columns, columns.stop :].T, errors, alpha=-1)
