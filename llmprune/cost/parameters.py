"""Parameters; a tied head counts once."""

from __future__ import annotations

from transformers import PretrainedConfig

from llmprune.cost.base import Sized
from llmprune.models.sites import Block

NAME = TITLE = "parameters"


def measure(whole: Sized) -> int:
    tied = whole.model.all_tied_weights_keys
    return sum(p.numel() for name, p in whole.model.named_parameters(remove_duplicate=False) if name not in tied)


def of_block(model: PretrainedConfig, block: Block) -> int:
    return sum(parameter.numel() for parameter in block.module.parameters())
