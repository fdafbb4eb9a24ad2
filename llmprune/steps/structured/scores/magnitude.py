"""Magnitude: the squared norm of all weights that belong to a group, of what makes it and of what reads it (L2)."""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.structured.scores.base import Coupled, highest


def select(coupled: Coupled, keep: int) -> Tensor:
    score = coupled.per_group(coupled.consumer.square().sum(0))
    for producer in coupled.producers:
        score = score + coupled.per_group(producer.square().sum(1))
    return highest(score, keep, coupled.bundles)
