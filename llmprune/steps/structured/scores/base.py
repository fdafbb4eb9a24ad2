"""The protocol of a score: a module with one pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmprune.numerics.stats import Gram


@dataclass(frozen=True, slots=True)
class Coupled:
    """A matrix whose inputs come in groups (heads, neurons), and the matrices whose rows make them.

    Attributes:
        consumer: (out, groups * width) float32.
        producers: each (groups * its own width, in), float32.
        gram: of the consumer's inputs.
        inputs: some of them, (tokens, in), spread evenly over what this process has seen.
        groups: how many there are.
        bundles: consecutive groups fall into so many bundles, and each must keep the same number.
        gain: of the norm whose output the producers read, (in,), for a score that has `gains`; None where there is none, or
            something between.
        slope: sum over the tokens of each of the consumer's inputs times the loss's gradient in it, for a score that has
            `backward`.
    """

    consumer: Tensor
    producers: Sequence[Tensor]
    gram: Gram
    inputs: Tensor
    groups: int
    bundles: int = 1
    gain: Tensor | None = None
    slope: Tensor | None = None

    def per_group(self, values: Tensor) -> Tensor:
        """Sum over each group of a value an input or row, (groups * width,) -> (groups,)."""
        return values.view(self.groups, -1).sum(1)


class Score(Protocol):
    """Every module in this package, `base` aside, is one. It knows matrices only.

    One that sets `backward` to True is given `Coupled.slope`, for which the run makes a backward pass; one that sets `gains`,
    `Coupled.gain`.
    """

    def select(self, coupled: Coupled, keep: int) -> Tensor:
        """The numbers of the `keep` groups that stay, ascending."""
        ...


def highest(score: Tensor, keep: int, bundles: int = 1) -> Tensor:
    """The `keep` groups of the highest scores (groups,), ascending; as many of each bundle."""
    parts = score.view(bundles, -1)
    best = parts.argsort(dim=1, descending=True, stable=True)[:, : keep // bundles]
    starts = torch.arange(bundles, device=score.device)[:, None] * parts.shape[1]
    return (best + starts).flatten().sort().values
