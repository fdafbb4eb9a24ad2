"""Output: the mean square of what a group adds to the consumer's output, were all groups independent.

Wanda's score (Sun et al., 2024), summed over a group.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.structured.scores.base import Coupled, highest


def select(coupled: Coupled, keep: int) -> Tensor:
    return highest(coupled.per_group(coupled.gram.rms().square() * coupled.consumer.square().sum(0)), keep, coupled.bundles)
