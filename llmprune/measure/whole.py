"""Whole models, timed as they are used: a prompt, or one decoded token beside the keys and values of those before it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.base.words import count
from llmprune.formats.kernels.timing import Call
from llmprune.job.options import PruneConfig
from llmprune.measure.speed import seconds_of, side_by_side

_FEWEST, _MOST = 5, 50  # turns of each side


@dataclass(frozen=True, slots=True)
class Use:
    """What is timed: `prefill` of `batch` prompts of `context` tokens, or `decode` of one token of each after so many."""

    phase: str
    batch: int
    context: int

    @classmethod
    def of(cls, config: PruneConfig, model: PretrainedConfig) -> Use:
        """As the options say, the context as long as the model's positions allow."""
        positions = getattr(model.get_text_config(), "max_position_embeddings", None) or config.for_context + 1
        return cls(config.for_, config.for_batch, max(min(config.for_context, positions - 1), 1))

    def __str__(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return f"{self.phase} {'of' if self.phase == 'prefill' else 'after'} {count(self.context, 'token')}{batch}"


def call_of(model: PreTrainedModel, use: Use, device: torch.device) -> Call:
    """One call of the model."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (use.batch, use.context), generator=generator).to(device)
    if use.phase == "prefill":
        return lambda: model(ids, use_cache=False, logits_to_keep=1)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    return lambda: _decode(model, ids[:, :1], cache)


def _decode(model: PreTrainedModel, ids: Tensor, cache: Any) -> None:
    """One token, which leaves the cache as it was: its layers put new tensors in the place of those that they had."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    model(ids, past_key_values=own, use_cache=True)


def compared(
    models: Sequence[PreTrainedModel], use: Use, device: torch.device, seconds: float, *, least: bool = False
) -> list[float]:
    """Seconds of one call of each model, turn about: the median of as many turns, 5 to 50, as fit into so many seconds; or the
    `least`, from which what else the machine does is left out."""
    calls = [call_of(model, use, device) for model in models]
    turn = sum(seconds_of(call, device) for call in calls)
    turns = min(max(int(seconds / turn), _FEWEST), _MOST)
    return side_by_side(calls, device, turns=turns, of_turns=min if least else median)
