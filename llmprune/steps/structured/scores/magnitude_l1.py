"""Magnitude by absolute values (L1), which large single weights sway less."""

from __future__ import annotations

from torch import Tensor

from llmprune.steps.structured.scores.base import Coupled, highest


def select(coupled: Coupled, keep: int) -> Tensor:
    score = coupled.per_group(coupled.consumer.abs().sum(0))
    for producer in coupled.producers:
        score = score + coupled.per_group(producer.abs().sum(1))
    return highest(score, keep, coupled.bundles)
