"""Bytes of the weights in memory, loaded in the dtype that they are stored in: a tied head counts once."""

from __future__ import annotations

from llmprune.cost.base import Sized

NAME, TITLE = "memory_bytes", "weight bytes in memory"


def measure(whole: Sized) -> int:
    return sum(
        parameter.numel() * whole.storage[name].itemsize
        for name, parameter in whole.model.named_parameters(remove_duplicate=False)
        if name not in whole.model.all_tied_weights_keys
    )
