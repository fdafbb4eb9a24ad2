"""Average percentage of zeros (Hu et al., "Network Trimming", 2016): what is silent for most tokens goes first.

For activation functions with zeros, such as OPT's ReLU; where there are none, all are equal and the first ones stay.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.structured.scores.base import Coupled, highest


def select(coupled: Coupled, keep: int) -> Tensor:
    return highest(coupled.per_group((coupled.inputs != 0).float().mean(0)), keep, coupled.bundles)
