"""Plain twins of the heavy solvers, written straight from the papers' formulas, for tests and benchmarks.

They use nothing of llmprune but its pattern objects, and compute in the dtype of what they are given: `w` (out, in) and
`h` = XᵀX / tokens (in, in).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.numerics.patterns import NM, Pattern


def keep(score: Tensor, pattern: Pattern) -> Tensor:
    """The highest scores, by topk."""
    groups = score.unflatten(1, (-1, pattern.m)) if isinstance(pattern, NM) else score.flatten()
    count = pattern.n if isinstance(pattern, NM) else score.numel() - round(pattern.sparsity * score.numel())
    top = groups.topk(count, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, top, True).view(score.shape)


def damped(h: Tensor) -> Tensor:
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def sparsegpt(w: Tensor, h: Tensor, pattern: Pattern) -> Tensor:
    """After each column, correct all later ones; unstructured masks are chosen 128 columns at a time."""
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(h)), upper=True)
    w, mask = w.clone(), torch.ones_like(w, dtype=torch.bool)
    step = 128 if pattern.period == 1 else pattern.period
    for j in range(w.shape[1]):
        if j % step == 0:
            mask[:, j : j + step] = keep((w[:, j : j + step] / upper.diagonal()[j : j + step]).square(), pattern)
        error = w[:, j].masked_fill(mask[:, j], 0) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return w.masked_fill(~mask, 0)


def refit(h: Tensor, w: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on the kept support; the residual is computed anew in each step, as its definition has it."""
    x = w * mask
    r = (w @ h - x @ h) * mask
    p = r.clone()
    for _ in range(steps):
        step = (r * r).sum(1) / (p * (p @ h)).sum(1).clamp_min(1e-30)
        x = x + step[:, None] * p
        after = (w @ h - x @ h) * mask
        p = after + ((after * after).sum(1) / (r * r).sum(1).clamp_min(1e-30))[:, None] * p
        r = after
    return x


def alps(w: Tensor, h: Tensor, pattern: Pattern) -> Tensor:
    """As published: eigh in float64, an n^3 inverse at the start and after every third iteration."""
    h = damped(h)
    scale = h.diagonal().sqrt()
    h = h / scale / scale[:, None]
    values, vectors = (part.to(w.dtype) for part in torch.linalg.eigh(h.double()))
    dense, start, moved = w * scale, 0.1, False
    while not moved and start > 1e-5:
        rho, d, v, mask = start, dense, torch.zeros_like(dense), keep(dense.abs(), pattern)
        kept, last = int(mask.sum()), mask
        inverse = (vectors / (values + rho)) @ vectors.T
        for iteration in range(1, 301):
            b = (dense @ h - v + rho * d) @ inverse
            mask = keep((b + v / rho).abs(), pattern)
            d = (b + v / rho) * mask
            v = v + rho * (b - d)
            if iteration % 3 == 0:
                change, last = int((mask ^ last).sum()), mask
                if change == 0 or (iteration >= 30 and change / kept < 3e-4):
                    break
                moved = True
                rho *= 1.3 if change > 0.1 * kept else 1.2 if change > 0.005 * kept else 1.1
                inverse = (vectors / (values + rho)) @ vectors.T
        start /= 5  # the first mask never changed: the penalty was too strong from the start
    return refit(h, dense, mask, 10) / scale
