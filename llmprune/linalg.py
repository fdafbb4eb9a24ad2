"""Damped factors of a Gram matrix: the one numerical policy that every solver shares.

A failed Cholesky raises the damping tenfold, in steps that are recorded, and then is an error; nothing is silently
replaced. Dead inputs (a zero on the diagonal) get the mean diagonal, so that they neither couple nor divide by zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import InputError

DAMPING = 0.01  # of the mean diagonal; SparseGPT's published default
_TRIES = 5


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """Upper triangular U with (H + damping * mean_diag * I)^-1 = UᵀU.

    Attributes:
        upper: U, (in, in).
        damping: the fraction of the mean diagonal that was added in the end.
        dead: (in,) bool, inputs that were never nonzero.
    """

    upper: Tensor
    damping: float
    dead: Tensor


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> InverseFactor:
    """Factor the inverse of the damped Gram `gram` (in, in).

    With H reversed in both axes, H_r = LLᵀ; reversing L gives the upper R with H = RRᵀ, so U = R^-1, which is L^-1
    reversed: one Cholesky and one triangular solve instead of factor, invert, factor again.

    Raises:
        InputError: the Gram is zero or not finite, or no damping up to 10^4 times the first one makes it definite.
    """
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(gram).all()):
        raise InputError("the calibration statistics are not finite")
    dead = diagonal <= 0
    if bool(dead.all()):
        raise InputError("the calibration inputs are all zero")
    mean = diagonal[~dead].mean()
    for step in range(_TRIES):
        fraction = damping * 10**step
        reversed_ = gram.flip(0, 1)  # a copy; at most four such matrices are alive at once
        reversed_.diagonal().add_((dead * mean + fraction * mean).flip(0))
        lower, info = torch.linalg.cholesky_ex(reversed_)
        del reversed_
        if not int(info):
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            return InverseFactor(torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1), fraction, dead)
    raise InputError(f"the Gram matrix is not positive definite even with {fraction:g} of its mean diagonal added")
