"""Bytes of keys and values that a token leaves in the cache, in the model's dtype."""

from __future__ import annotations

from llmprune.base.errors import InputError
from llmprune.cost.base import Sized
from llmprune.models.heads import Heads

NAME, TITLE = "kv_bytes_a_token", "bytes of keys and values a token"


def measure(whole: Sized) -> int | None:
    text = whole.model.config.get_text_config()
    try:
        layouts = [Heads.of(text.per_layer_config[index]) for index in range(len(whole.blocks))]
    except InputError:
        return None
    return sum(2 * own.value * own.width * whole.model.dtype.itemsize for own in layouts)
