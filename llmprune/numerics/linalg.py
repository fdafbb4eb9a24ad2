"""The numerics of a Gram matrix that solvers share: one policy of damping, factors, and masked least squares.

A failed Cholesky raises the damping tenfold, in steps that are recorded, and then is an error; nothing is silently
replaced. Dead inputs (a zero on the diagonal) get the mean diagonal, so that they neither couple nor divide by zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.base.errors import InputError

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


@dataclass(frozen=True, slots=True)
class Scaled:
    """H + damping * mean_diag * I, seen in units in which its diagonal is 1: `matrix` = S^-1 (...) S^-1.

    Attributes:
        matrix: (..., in, in), unit diagonal.
        scale: (..., in), S: weights in these units are W * scale.
        dead: (..., in) bool, inputs that were never nonzero.
    """

    matrix: Tensor
    scale: Tensor
    dead: Tensor

    def into(self, w: Tensor) -> Tensor:
        """Weights (..., out, in) in these units, those of dead inputs zero."""
        return (w * self.scale[..., None, :]).masked_fill_(self.dead[..., None, :], 0)

    def back(self, w: Tensor) -> Tensor:
        """Weights (..., out, in) in these units, as they were before."""
        return w / self.scale[..., None, :]

    def inverse(self, rho: float) -> Tensor:
        """(matrix + rho I)^-1, (..., in, in).

        Raises:
            InputError: it is not positive definite.
        """
        shifted = self.matrix.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(rho)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if bool(info.any()):
            raise InputError(f"the Gram matrix is not positive definite even with {rho:g} of its diagonal added")
        return torch.cholesky_inverse(lower)


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> InverseFactor:
    """Factor the inverse of the damped Gram `gram` (in, in).

    With H reversed in both axes, H_r = LLᵀ; reversing L gives the upper R with H = RRᵀ, so U = R^-1, which is L^-1
    reversed: one Cholesky and one triangular solve instead of factor, invert, factor again.

    Raises:
        InputError: the Gram is zero or not finite, or no damping up to 10^4 times the first one makes it definite.
    """
    dead, mean = _alive(gram)
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


def scaled(gram: Tensor, damping: float = 0.0) -> Scaled:
    """`gram` (..., in, in) with `damping` times its mean diagonal added, and brought to unit diagonal.

    Raises:
        InputError: the Gram is zero or not finite.
    """
    dead, mean = _alive(gram)
    matrix = gram.clone()
    mean = mean[..., None]
    matrix.diagonal(dim1=-2, dim2=-1).add_(dead * mean + damping * mean)
    scale = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    return Scaled(matrix.div_(scale[..., None, :]).div_(scale[..., None]), scale, dead)


def _alive(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Which inputs are dead, and the mean diagonal of the others."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    if not bool(torch.isfinite(gram).all()):
        raise InputError("the calibration statistics are not finite")
    dead = diagonal <= 0
    if bool(dead.all(-1).any()):
        raise InputError("the calibration inputs are all zero")
    return dead, diagonal.masked_fill(dead, 0).sum(-1) / (~dead).sum(-1)


def kept_least_squares(gram: Tensor, target: Tensor, w: Tensor, kept: Tensor) -> Tensor:
    """Minimise Tr((Ŵ - T) H (Ŵ - T)ᵀ) over weights Ŵ (out, in) that are zero but for the columns `kept`; returns those.

    One factor for all rows. H is damped towards the kept columns of `w`, which are what is found where H says nothing.

    Raises:
        InputError: the Gram is zero or not finite, or cannot be factored.
    """
    change = target - w.index_fill(1, _others(kept, w.shape[1]), 0)
    aim = (change @ gram)[:, kept]
    upper = inverse_factor(gram[kept][:, kept]).upper
    return w[:, kept] + (aim @ upper.T) @ upper


def _others(kept: Tensor, count: int) -> Tensor:
    mask = torch.ones(count, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero().squeeze(1)


@dataclass(frozen=True, slots=True)
class Refitted:
    """What `masked_least_squares` found.

    Attributes:
        weight: (..., out, in), +0.0 wherever the mask is False.
        residual: norm of the gradient that is left, relative to the gradient at zero weights.
        steps: conjugate gradient steps, one product each.
    """

    weight: Tensor
    residual: float
    steps: int


def masked_least_squares(
    gram: Tensor, target: Tensor, mask: Tensor, start: Tensor, *, steps: int = 20, tolerance: float = 1e-4
) -> Refitted:
    """Minimise Tr((Ŵ - T) H (Ŵ - T)ᵀ) over the weights Ŵ (..., out, in) that `mask` keeps, from `start`.

    Conjugate gradients with Jacobi preconditioning on all rows at once; the error falls with every step, so that
    stopping early is safe. Inputs that are dead in `gram` (..., in, in) keep the weights of `start`.

    Args:
        target: T, (..., out, in), the weights to imitate.
        steps: at most this many, one product (out, in) x (in, in) each, and two more for the first gradient and its
            scale.
        tolerance: stop when the relative residual is below it.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)[..., None, :]
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    kept = mask.to(gram.dtype)  # to multiply with: several times faster than masked_fill
    x = start.masked_fill(~mask, 0)
    whole = _norm((target @ gram).mul_(kept), inverse)
    r = ((target - x) @ gram).mul_(kept)
    z = r * inverse
    p = z.clone()
    rz = (r * z).sum(-1, keepdim=True)
    done, residual = 0, _relative(rz, whole)
    while done < steps and residual > tolerance:
        q = (p @ gram).mul_(kept)
        curvature = (p * q).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, rz / curvature, 0)
        x.addcmul_(p, step)
        r.addcmul_(q, step, value=-1)
        torch.mul(r, inverse, out=z)
        last, rz = rz, (r * z).sum(-1, keepdim=True)
        p.mul_(torch.where(last > 0, rz / last, 0)).add_(z)
        done, residual = done + 1, _relative(rz, whole)
    return Refitted(x, residual, done)


def _norm(gradient: Tensor, inverse: Tensor) -> Tensor:
    """Squared norm of each row, as the preconditioner measures it, (..., out, 1)."""
    return (gradient.square() * inverse).sum(-1, keepdim=True)


def _relative(rz: Tensor, whole: Tensor) -> float:
    total = float(whole.sum())
    return (float(rz.sum()) / total) ** 0.5 if total > 0 else 0.0
