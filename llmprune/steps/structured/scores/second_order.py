"""Second order: what the output loses when a group goes and all others make up for it.

For the inputs S of a group and the inverse Gram P, the loss is Tr(W_S (P_SS)^-1 W_Sᵀ), the optimal brain surgeon's, for
columns (Hassibi & Stork, 1993; ZipLM, Kurtic et al., 2023). Groups go in rounds, the least first; after each round the
weights and P are those of the inputs that are left.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmprune.numerics.linalg import inverse_factor
from llmprune.steps.structured.scores.base import Coupled

_ROUNDS = 16  # at most; in each, the groups' losses are taken to be independent


def select(coupled: Coupled, keep: int) -> Tensor:
    alive = torch.ones(coupled.groups, dtype=torch.bool, device=coupled.consumer.device)
    for going, _ in rounds(coupled, keep):
        alive[going] = False
    return alive.nonzero().squeeze(1)


def rounds(coupled: Coupled, keep: int) -> Iterator[tuple[Tensor, float]]:
    """Until `keep` groups are left: the groups that go together, and what the output loses by that, Tr(dW H dWᵀ)."""
    factor = inverse_factor(coupled.gram.mean())
    w, inverse = coupled.consumer.masked_fill(factor.dead, 0), factor.upper.T @ factor.upper  # dead inputs cost nothing
    columns = torch.arange(w.shape[1], device=w.device).view(coupled.groups, -1)
    alive = torch.ones(coupled.groups, dtype=torch.bool, device=w.device)
    left = (coupled.groups - keep) // coupled.bundles  # to go, a bundle
    most = max(-(-left // _ROUNDS), 1)
    while left:
        count = min(left, most)
        loss = losses(w, inverse, columns).masked_fill(~alive, torch.inf).view(coupled.bundles, -1)
        starts = torch.arange(coupled.bundles, device=w.device)[:, None] * loss.shape[1]
        going = (loss.argsort(dim=1, stable=True)[:, :count] + starts).flatten()
        gone = columns[going].flatten()
        within = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        solved = torch.linalg.solve(inverse[gone][:, gone], w[:, gone].T)
        yield going, float((w[:, gone].T * solved).sum())
        w -= w[:, gone] @ within
        inverse -= inverse[:, gone] @ within
        alive[going] = False
        left -= count


def losses(w: Tensor, inverse: Tensor, columns: Tensor) -> Tensor:
    """Of each group of `columns` (groups, width): the loss in output error of removing it, (groups,).

    `inverse` is the inverse of the Gram (in, in) of the inputs of `w` (out, in). A group that is gone already has none
    that means anything.
    """
    if columns.shape[1] == 1:
        return w.square().sum(0) / inverse.diagonal().clamp_min(torch.finfo(w.dtype).tiny)
    blocks = torch.stack([inverse[group][:, group] for group in columns])
    parts = w[:, columns].permute(1, 2, 0)  # (groups, width, out)
    solved, info = torch.linalg.solve_ex(blocks, parts)
    return (parts * solved).sum((1, 2)).masked_fill(info != 0, 0)
