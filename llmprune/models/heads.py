"""How a model's attention is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from llmprune.base.errors import InputError
from llmprune.base.words import count
from llmprune.models.families import HEAD_WIDTH, QUERY_HEADS, VALUE_HEADS


@dataclass(frozen=True, slots=True)
class Heads:
    """How a model's attention is laid out: query heads, heads of keys and values, and the width of one."""

    query: int
    value: int
    width: int

    def __str__(self) -> str:
        return f"{count(self.query, 'head')}, {self.value} of keys and values, {self.width} wide"

    @classmethod
    def of(cls, config: PretrainedConfig) -> Heads:
        """Raises: InputError: the configuration does not say."""
        text = config.get_text_config()
        query = getattr(text, QUERY_HEADS.name, None)
        if not query:
            raise InputError(f"the configuration of {config.model_type} has no {QUERY_HEADS.name}: its heads cannot be removed")
        width = getattr(text, HEAD_WIDTH.name, None) or text.hidden_size // query
        return cls(query, getattr(text, VALUE_HEADS.name, None) or query, width)
