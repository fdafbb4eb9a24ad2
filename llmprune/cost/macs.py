"""Multiplications a token with matrices, routers' and the head's included; of experts, with those of as many as a token is
sent to.

Attention's own products, which grow with the length of the text, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from llmprune.cost.base import Sized
from llmprune.cost.matrices import matrices
from llmprune.models.discover import ROUTER, unreached
from llmprune.models.experts import experts_per_token
from llmprune.models.sites import Block

NAME, TITLE = "macs_a_token", "multiplications a token"


def measure(whole: Sized) -> int:
    text = whole.model.config.get_text_config()
    return active(text, whole.blocks) + sum(map(_routing, whole.blocks)) + text.vocab_size * text.hidden_size


def active(model: PretrainedConfig, blocks: Sequence[Block]) -> int:
    """Weights of the blocks' matrices that a token meets: of experts, those of as many as it is sent to (all, where the
    configuration does not say how many)."""
    chosen = experts_per_token(model)
    return round(sum(one.rows * one.columns * one.share for block in blocks for one in matrices(block.sites, chosen)))


def of_block(model: PretrainedConfig, block: Block) -> int:
    return active(model, [block]) + _routing(block)


def _routing(block: Block) -> int:
    """Weights of what chooses experts."""
    routers = [name for name, why in unreached(block).items() if why == ROUTER]
    return sum(block.module.get_parameter(name.removeprefix(f"{block.name}.")).numel() for name in routers)
