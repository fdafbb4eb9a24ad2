"""Gradient: how much the model's loss would change, to first order, were a group to put out zero: |sum of a dL/da|.

Taylor expansion (Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017) of the
language model's own loss, over the calibration tokens.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.steps.structured.scores.base import Coupled, highest

backward = True


def select(coupled: Coupled, keep: int) -> Tensor:
    if coupled.slope is None:
        raise InputError("the gradient score needs a backward pass, which this run has not made")
    return highest(coupled.per_group(coupled.slope).abs(), keep, coupled.bundles)
