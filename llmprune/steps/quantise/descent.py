"""Coordinate descent on the codes: each in turn becomes the best one, all others as they are. The loss never rises."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmprune.steps.quantise.grid import Quantised

_BLOCK = 128  # columns after which the gradient of the rest is brought up to date at once


def descended(found: Quantised, kept: Tensor | None, target: Tensor, gram: Tensor, *, sweeps: int) -> Quantised:
    """At most `sweeps` times through the columns; fewer where none of the codes changes any more.

    Args:
        kept: (out, in) bool, False where the code is to be zero; None: nowhere.
        target: (out, in), the weights to imitate.
        gram: (in, in), with a positive diagonal.
    """
    grid, diagonal = found.grid, gram.diagonal()
    codes, scales = found.codes.T.contiguous(), grid.spread(found.scales).T.contiguous()
    mask = None if kept is None else kept.T.contiguous()
    gradient = gram @ (codes * scales - target.T)
    for _ in range(sweeps):
        before = codes.clone()
        for lo in range(0, len(codes), _BLOCK):
            own = slice(lo, min(lo + _BLOCK, len(codes)))
            inside, near, moved = gradient[own].clone(), gram[own, own], torch.empty_like(codes[own])
            for place, j in enumerate(range(own.start, own.stop)):
                wanted = codes[j] - inside[place] / (diagonal[j] * scales[j])
                new = grid.nearest(wanted, None if mask is None else mask[j])
                moved[place] = (new - codes[j]) * scales[j]
                codes[j] = new
                inside.addr_(near[place], moved[place])
            gradient.addmm_(gram[:, own], moved)
        if torch.equal(before, codes):
            break
    return replace(found, codes=codes.T.contiguous())
