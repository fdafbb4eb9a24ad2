"""Mean absolute activation of a group. Unlike `activation`, few large values do not make up for many small ones."""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.structured.scores.base import Coupled, highest


def select(coupled: Coupled, keep: int) -> Tensor:
    return highest(coupled.per_group(coupled.inputs.abs().mean(0)), keep, coupled.bundles)
