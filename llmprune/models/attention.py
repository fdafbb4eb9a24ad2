"""Attention of bfloat16 models on a CPU: transformers' "sdpa" answered by `numerics/attention.py` where that is the same.

transformers dispatch attention by name. What has a mask, dropout, a cap, a bias or a cache stays with their own function, and
so does a window that slides, which they make a mask of unless it is longer than the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from llmprune.numerics.attention import causal_attention

Attended = tuple[Tensor, Any]  # (batch, tokens, heads, width), and what transformers would call the weights
_NAME = "sdpa"
_MORE = ("softcap", "position_bias", "cache")  # arguments that ask for more than attention


@contextmanager
def fast_attention() -> Iterator[None]:
    """Within it plain causal attention of bfloat16 tensors on a CPU is one operation of ours, `llmprune::causal_attention`."""
    own: Callable[..., Attended] = AttentionInterface()[_NAME]

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **more: Any,
    ) -> Attended:
        """query, key, value: (batch, heads, tokens, width)."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        plain = attention_mask is None and not dropout and all(more.get(name) is None for name in _MORE)
        if not (causal and plain and _fits(query, key, value)):
            return own(module, query, key, value, attention_mask, dropout, scaling, is_causal, **more)
        out = causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, forward)
    try:
        yield
    finally:
        AttentionInterface.register(_NAME, own)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether they are bfloat16, on a CPU, of equal widths, and more than one token and no other tokens than the queries'."""
    if any(x.dtype != torch.bfloat16 or x.device.type != "cpu" for x in (query, key, value)):
        return False
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    return tokens > 1 and heads % groups == 0 and key.shape == value.shape == (batch, groups, tokens, width)
