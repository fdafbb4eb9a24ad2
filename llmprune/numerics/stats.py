"""What solvers ask of calibration: running sums over the tokens that reach a matrix.

Every statistic counts tokens, never batches, so that windows of any length weigh what they hold, and two of them
(from two processes) merge by addition. Padding is removed before `add`. `x` is (tokens, in).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from llmprune.base.precision import full_float32
from llmprune.numerics.linalg import InverseFactor, Scaled, inverse_factor, scaled
from llmprune.numerics.products import add_product, bfloat16_products, factor

if TYPE_CHECKING:
    from typing_extensions import Self


class Statistic(Protocol):
    """A token-weighted sum; built as `Statistic(columns, device)`."""

    tokens: int

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, x: Tensor) -> None:
        """Count the inputs `x` (tokens, in)."""
        ...

    def merge(self, other: Self) -> None:
        """Count all that `other` counted."""
        ...

    def blend(self, pool: Self, tokens: int) -> None:
        """Count `tokens` more inputs that are distributed as those of `pool`."""
        ...

    @classmethod
    def batch(cls, each: Sequence[Self]) -> Self:
        """Several as one, for a solver that takes a batch of matrices."""
        ...

    def sums(self) -> list[Tensor]:
        """What adds up over processes, apart from the tokens; changed in place."""
        ...

    def finite(self) -> bool: ...


S = TypeVar("S", bound=Statistic)


def blend_with_pool(statistics: Sequence[S], tokens: int) -> None:
    """Blend each with the pool, which is all of them together and weighs as much as `tokens` inputs: the fewer one saw itself,
    the more."""
    pool = copy.deepcopy(statistics[0])
    for other in statistics[1:]:
        pool.merge(other)
    for one in statistics:
        one.blend(pool, tokens)


class TokenCount:
    """Tokens only, for a method that needs no calibration."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)

    def merge(self, other: Self) -> None:
        self.tokens += other.tokens

    def blend(self, pool: Self, tokens: int) -> None:
        self.tokens += tokens

    @classmethod
    def batch(cls, each: Sequence[Self]) -> Self:
        return each[0]

    def sums(self) -> list[Tensor]:
        return []

    def finite(self) -> bool:
        return True


class Moments:
    """Sums of each input and of its square, (in,) in float64."""

    _SUMS: ClassVar[tuple[str, ...]] = ("total", "squares")

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)
        x = x.float()
        self.total += x.sum(0, dtype=torch.float64)
        self.squares += x.square().sum(0, dtype=torch.float64)

    def merge(self, other: Self) -> None:
        self.tokens += other.tokens
        self.total += other.total
        self.squares += other.squares

    def blend(self, pool: Self, tokens: int) -> None:
        share = tokens / max(pool.tokens, 1)
        self.tokens += tokens
        self.total += share * pool.total
        self.squares += share * pool.squares

    @classmethod
    def batch(cls, each: Sequence[Self]) -> Self:
        one = cls(0, each[0].total.device)
        one.tokens = 1
        for name in one._SUMS:
            setattr(one, name, torch.stack([getattr(own, name) / max(own.tokens, 1) for own in each]))
        return one

    def sums(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._SUMS]

    def finite(self) -> bool:
        return bool(torch.isfinite(self.squares).all())

    def means(self) -> Tensor:
        """Mean of each input over the tokens, (in,) float32."""
        return (self.total / max(self.tokens, 1)).float()

    def rms(self) -> Tensor:
        """Root mean square of each input over the tokens, (in,) float32."""
        return (self._squares() / max(self.tokens, 1)).sqrt().float()

    def variance(self) -> Tensor:
        """Variance of each input over the tokens, (in,) float32."""
        count = max(self.tokens, 1)
        return (self._squares() / count - (self.total / count).square()).clamp_min(0).float()

    def _squares(self) -> Tensor:
        return self.squares


class Gram(Moments):
    """H = XᵀX, (in, in) in float32: the Hessian of the layer's squared output error, up to a factor.

    Its diagonal holds the squares, so that it serves every method that asks for `Moments`.
    """

    _SUMS = ("total", "sum")

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)
        with full_float32(), bfloat16_products(x):
            x = factor(x)
            add_product(self.sum, x, x)
        self.total += x.sum(0, dtype=torch.float32)

    def merge(self, other: Self) -> None:
        self.tokens += other.tokens
        self.total += other.total
        self.sum += other.sum

    def blend(self, pool: Self, tokens: int) -> None:
        share = tokens / max(pool.tokens, 1)
        self.tokens += tokens
        self.total += share * pool.total
        self.sum.add_(pool.sum, alpha=share)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.sum).all())

    def mean(self) -> Tensor:
        """H / tokens, (in, in)."""
        return self.sum / max(self.tokens, 1)

    @full_float32()
    def errors(self, dense: Tensor, pruned: Tensor) -> tuple[float, float]:
        """‖X(W - Ŵ)ᵀ‖² and ‖XWᵀ‖² over the tokens, for W, Ŵ (out, in), by way of the Gram."""
        gap = dense - pruned
        lost, whole = (((w @ self.sum) * w).sum(dtype=torch.float64) for w in (gap, dense))
        return max(float(lost), 0.0), max(float(whole), 0.0)

    @cached_property
    def factor(self) -> InverseFactor:
        """The damped inverse factor, computed once for all matrices that share this input. Only after the last `add`."""
        return inverse_factor(self.mean())

    @cached_property
    def unit(self) -> Scaled:
        """The Gram in units in which its diagonal is 1, undamped, computed once as `factor` is."""
        return scaled(self.mean())

    def _squares(self) -> Tensor:
        return self.sum.diagonal().double()


class CrossGram:
    """C = X_dᵀX, (in, in) in float32: dense inputs X_d, token by token beside the pruned model's inputs X."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x: Tensor, dense: Tensor) -> None:
        self.tokens += len(x)
        with full_float32(), bfloat16_products(x, dense):
            add_product(self.sum, factor(dense), factor(x))

    def corrected_target(self, w: Tensor, gram: Gram, blend: float) -> Tensor:
        """The weights (out, in) whose outputs for X come nearest to those of `w` for X_d: W + blend W (C - H) H^-1.

        A blend of 0 is `w` itself, 1 the whole way. H is damped as the solvers damp it.
        """
        upper = gram.factor.upper
        drift = w @ (self.sum - gram.sum) / max(self.tokens, 1)
        return w.addmm(drift @ upper.T, upper, alpha=blend)


SAMPLE_TOKENS = 2048  # calibration tokens that output errors are measured on


class InputSample:
    """Every `stride`-th of the inputs, `tokens` in all, to measure a matrix's output error on: (tokens / stride, in)."""

    def __init__(self, stride: int) -> None:
        self.tokens = 0
        self._stride = max(stride, 1)
        self._next = 0
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)
        self._parts.append(x[self._next :: self._stride].to(torch.float32, copy=True))  # a view would keep all of x alive
        self._next = (self._next - len(x)) % self._stride

    def inputs(self) -> Tensor:
        """(tokens / stride, in)."""
        return torch.cat(self._parts)

    @full_float32()
    def errors(self, dense: Tensor, pruned: Tensor, shift: Tensor | None = None) -> tuple[float, float]:
        """‖X(W - Ŵ)ᵀ - b‖² and ‖XWᵀ‖² for W, Ŵ (out, in): what is lost of a matrix's outputs, and what there was. `shift`, b,
        is what Ŵ's bias is more than W's.
        """
        x = self.inputs()
        gap = x @ (dense - pruned).T
        lost = (gap if shift is None else gap - shift).square().sum(dtype=torch.float64)
        return float(lost), float((x @ dense.T).square().sum(dtype=torch.float64))
