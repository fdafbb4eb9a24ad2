"""How a model's attention is laid out."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from llmprune.base.errors import InputError
from llmprune.base.words import count


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
        query = getattr(text, "num_attention_heads", None)
        if not query:
            raise InputError(
                f"the configuration of {config.model_type} has no num_attention_heads: its heads cannot be removed"
            )
        width = getattr(text, "head_dim", None) or text.hidden_size // query
        return cls(query, getattr(text, "num_key_value_heads", None) or query, width)
