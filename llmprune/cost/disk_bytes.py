"""Bytes of the weights' files, headers aside: every tensor in the dtype that it is stored in."""

from __future__ import annotations

from transformers import PretrainedConfig

from llmprune.cost.base import Sized
from llmprune.models.sites import Block

NAME, TITLE = "disk_bytes", "weight bytes on disk"


def measure(whole: Sized) -> int:
    return whole.outside + sum(of_block(whole.model.config, block) for block in whole.blocks)


def of_block(model: PretrainedConfig, block: Block) -> int:
    stored = block.storage
    return sum(p.numel() * stored[f"{block.name}.{name}"].itemsize for name, p in block.module.named_parameters())
