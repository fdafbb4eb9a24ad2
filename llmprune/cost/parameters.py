"""Parameters; a tied head counts once."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from llmprune.models.sites import Block

NAME = TITLE = "parameters"


def measure(model: PreTrainedModel, blocks: Sequence[Block]) -> int:
    tied = model.all_tied_weights_keys
    return sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name not in tied)
