"""Bytes of keys and values that a token leaves in the cache, in the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.models.heads import Heads
from llmprune.models.sites import Block

NAME, TITLE = "kv_bytes_a_token", "bytes of keys and values a token"


def measure(model: PreTrainedModel, blocks: Sequence[Block]) -> int | None:
    text = model.config.get_text_config()
    try:
        layouts = [Heads.of(text.per_layer_config[index]) for index in range(len(blocks))]
    except InputError:
        return None
    return sum(2 * own.value * own.width * model.dtype.itemsize for own in layouts)
