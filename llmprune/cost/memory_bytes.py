"""Bytes of the weights in memory, loaded in the dtype that they are stored in: a tied head counts once."""

from __future__ import annotations

from llmprune.base.hardware import stored_dtype
from llmprune.cost import disk_bytes
from llmprune.cost.base import Sized

NAME, TITLE = "memory_bytes", "weight bytes in memory"


def measure(whole: Sized) -> int:
    model, inside = whole.model, tuple(f"{block.name}." for block in whole.blocks)
    outside = sum(
        parameter.numel() * stored_dtype(model.config).itemsize
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in model.all_tied_weights_keys and not name.startswith(inside)
    )
    return outside + sum(disk_bytes.of_block(model.config, block) for block in whole.blocks)
