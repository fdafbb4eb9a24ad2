"""Scaling: magnitude, the weights that make a group counted with the gain of the norm before them.

The gain is part of the product, so that a small weight behind a large gain is not small.
"""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.structured.scores.base import Coupled, highest

gains = True


def select(coupled: Coupled, keep: int) -> Tensor:
    score = coupled.per_group(coupled.consumer.square().sum(0))
    for producer in coupled.producers:
        seen = producer if coupled.gain is None else producer * coupled.gain
        score = score + coupled.per_group(seen.square().sum(1))
    return highest(score, keep, coupled.bundles)
