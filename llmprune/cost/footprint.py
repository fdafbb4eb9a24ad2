"""All costs of a model."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from llmprune.cost import kv_cache, macs, parameters
from llmprune.cost.base import Cost
from llmprune.models.sites import Block

COSTS: tuple[Cost, ...] = (parameters, macs, kv_cache)  # in the order in which they are shown


def footprint(model: PreTrainedModel, blocks: Sequence[Block]) -> dict[str, int]:
    """By name, those that are known of the model, whose weights may be on the meta device."""
    measured = {cost.NAME: cost.measure(model, blocks) for cost in COSTS}
    return {name: value for name, value in measured.items() if value is not None}


def cost_title(name: str) -> str:
    """What a cost of a record is called where people read it."""
    return next((cost.TITLE for cost in COSTS if name == cost.NAME), name.replace("_", " "))
