"""FLAP (An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2024): the variance of each
input over the tokens times the squared norm of the weights that read it. What hardly varies can be replaced by a bias.

Leaves out FLAP's ranking across layers: sizes are the same in each.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.structured.scores.base import Coupled, highest


def select(coupled: Coupled, keep: int) -> Tensor:
    return highest(coupled.per_group(coupled.gram.variance() * coupled.consumer.square().sum(0)), keep, coupled.bundles)
