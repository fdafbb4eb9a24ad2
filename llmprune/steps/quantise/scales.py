"""The scales of groups: of weights by search, of codes by least squares."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.steps.quantise.grid import Grid, Quantised
from llmprune.steps.quantise.loss import row_losses

_SHRINKS = tuple(1 - 0.05 * step for step in range(13))  # shares of the scale at which nothing is clipped
_RIDGE = 1e-6  # of the mean diagonal


def largest(w: Tensor, kept: Tensor | None, grid: Grid) -> Tensor:
    """The scales (...) at which the largest kept weight of each group `w` (..., columns) has the largest code."""
    return grid.stored((w if kept is None else w * kept).abs().amax(-1) / grid.most)


def searched(w: Tensor, kept: Tensor | None, importance: Tensor, grid: Grid) -> Tensor:
    """The scale (out,) of each row of one group's weights `w` (out, columns): of several shares of the `largest`, that with
    the least rounding error, columns weighted by `importance` (columns,)."""
    kept_weights = w if kept is None else w * kept
    whole = largest(w, kept, grid)
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in _SHRINKS:
        scale = grid.stored(share * whole)
        rounded = grid.nearest(w / scale[:, None], kept) * scale[:, None]
        lost = ((kept_weights - rounded).square() * importance).sum(-1)
        better = lost < least
        best, least = torch.where(better, scale, best), torch.where(better, lost, least)
    return best


def fitted(found: Quantised, target: Tensor, gram: Tensor) -> Quantised:
    """The same codes with the scales that bring each row nearest to `target` (out, in) by `gram` (in, in); rows that would be
    worse with them as stored stay as they are."""
    grid, codes = found.grid, found.codes
    rows, columns = codes.shape
    groups = columns // grid.group
    system = codes.new_empty(rows, groups, groups)
    for group in range(groups):
        own = slice(group * grid.group, (group + 1) * grid.group)
        system[:, group] = ((codes[:, own] @ gram[own]) * codes).view(rows, groups, grid.group).sum(-1)
    aim = ((target @ gram) * codes).view(rows, groups, grid.group).sum(-1)
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    diagonal += _RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(system.dtype).tiny
    scales, failed = torch.linalg.solve_ex(system, aim)
    usable = torch.isfinite(scales).all(-1, keepdim=True) & (scales > 0) & (failed == 0)[:, None]
    other = replace(found, scales=torch.where(usable, grid.stored(scales.clamp_min(0)), found.scales))
    better = row_losses(other, target, gram) < row_losses(found, target, gram)
    return replace(found, scales=torch.where(better[:, None], other.scales, found.scales))
