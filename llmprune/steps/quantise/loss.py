"""What a quantised matrix loses: the squared error of its outputs, by way of the Gram of its inputs."""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.quantise.grid import Quantised


def row_losses(found: Quantised, target: Tensor, gram: Tensor) -> Tensor:
    """(q - t) H (q - t)ᵀ for each row, (out,)."""
    gap = found.weight() - target
    return ((gap @ gram) * gap).sum(-1)
