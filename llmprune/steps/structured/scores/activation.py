"""Activation: the mean square of what a group puts out. Knows nothing of how it is read."""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.structured.scores.base import Coupled, highest


def select(coupled: Coupled, keep: int) -> Tensor:
    return highest(coupled.per_group(coupled.gram.rms().square()), keep, coupled.bundles)
