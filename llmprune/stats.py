"""What solvers ask of calibration: running sums over the tokens that reach a matrix.

Every statistic counts tokens, never batches, so that windows of any length weigh what they hold, and two of them
(from two processes) merge by addition. Padding is removed before `add`. `x` is (tokens, in).
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from llmprune.linalg import InverseFactor, inverse_factor


class Statistic(Protocol):
    """A token-weighted sum; built as `Statistic(columns, device)`."""

    tokens: int

    def __init__(self, columns: int, device: torch.device) -> None: ...

    def add(self, x: Tensor) -> None:
        """Count the inputs `x` (tokens, in)."""
        ...

    def merge(self, other: Statistic) -> None:
        """Count all that `other` counted."""
        ...

    def finite(self) -> bool: ...


class TokenCount:
    """Tokens only, for a method that needs no calibration."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)

    def merge(self, other: TokenCount) -> None:
        self.tokens += other.tokens

    def finite(self) -> bool:
        return True


class ColumnNorm:
    """Sum of squares of each input, (in,) in float64."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.squares = torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)
        self.squares += x.float().square().sum(0, dtype=torch.float64)

    def merge(self, other: ColumnNorm) -> None:
        self.tokens += other.tokens
        self.squares += other.squares

    def finite(self) -> bool:
        return bool(torch.isfinite(self.squares).all())

    def rms(self) -> Tensor:
        """Root mean square of each input over the tokens, (in,) float32."""
        return (self.squares / max(self.tokens, 1)).sqrt().float()


class Gram:
    """H = XᵀX, (in, in) in float32: the Hessian of the layer's squared output error, up to a factor."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.tokens = 0
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        self.tokens += len(x)
        x = x.float()
        self.sum.addmm_(x.T, x)

    def merge(self, other: Gram) -> None:
        self.tokens += other.tokens
        self.sum += other.sum

    def finite(self) -> bool:
        return bool(torch.isfinite(self.sum).all())

    def mean(self) -> Tensor:
        """H / tokens, (in, in)."""
        return self.sum / max(self.tokens, 1)

    @cached_property
    def factor(self) -> InverseFactor:
        """The damped inverse factor, computed once for all matrices that share this input. Only after the last `add`."""
        return inverse_factor(self.mean())


class InputSample:
    """Every `stride`-th input token, to measure a matrix's output error on: (tokens / stride, in)."""

    def __init__(self, stride: int) -> None:
        self._stride = max(stride, 1)
        self._next = 0
        self._parts: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self._parts.append(x[self._next :: self._stride].float())
        self._next = (self._next - len(x)) % self._stride

    def relative_error(self, dense: Tensor, pruned: Tensor) -> float:
        """‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² for W, Ŵ (out, in); 0 where the dense output is zero."""
        x = torch.cat(self._parts)
        lost = (x @ (dense - pruned).T).square().sum(dtype=torch.float64)
        whole = (x @ dense.T).square().sum(dtype=torch.float64)
        return float(lost / whole) if whole > 0 else 0.0
