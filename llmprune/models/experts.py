"""Mixtures of experts, whose matrices transformers keep fused in 3-D parameters: one site an expert's matrix.

transformers dispatch their experts' forward by name; ours does what their own eager code does, expert by expert, and shows
each expert's inputs to whoever watches. Leaves out experts that are not dispatched so (Llama 4), or that normalise after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llmprune.models.attention import fast_attention
from llmprune.models.families import EXPERTS, EXPERTS_PER_TOKEN, FusedExperts
from llmprune.models.sites import INNER, OUTER, Part, Site, show

Experts = Any  # an nn.Module with the attributes that transformers' `use_experts_implementation` gives it
_FORWARD = "llmprune"
_ALL = "_llmprune_all_tokens"
_DISPATCHED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what `use_experts_implementation` sets


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds experts that `observable` can run."""
    said = all(hasattr(module, name) for name in _DISPATCHED)
    if not said or getattr(module, "has_post_expert_norm", False):  # older transformers have none
        return False
    names = _names(module)
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in (names.first, names.last))


def experts_per_token(config: PretrainedConfig) -> int | None:
    """How many experts of a layer a token is sent to, by the model's configuration; None where it does not say."""
    named = (getattr(config.get_text_config(), row.name, None) for row in EXPERTS_PER_TOKEN)
    return next((count for count in named if isinstance(count, int)), None)


def expert_sites(name: str, module: Experts, storage: dict[str, torch.dtype]) -> list[Site]:
    """The matrices of the experts `module`, called `name` in full; `storage`: dtype on disk by the parameter's own name."""
    sites = []
    names = _names(module)
    for expert in range(module.num_experts):
        for matrix, parameter, part in _matrices(module, names, expert):
            pool = f"{name}.{INNER if parameter == names.last else OUTER}"
            full = f"{name}.{parameter}"
            sites.append(Site(f"{name}.{expert}.{matrix}", module, full, module.is_transposed, storage[parameter], part, pool))
    return sites


def _names(module: Experts) -> FusedExperts:
    return next(row for row in EXPERTS if (len(row.matrices) > 1) == module.has_gate)


def _matrices(module: Experts, names: FusedExperts, expert: int) -> Iterator[tuple[str, str, Part]]:
    """Each matrix of one expert: its name, its parameter, and the part of it that it is."""
    if not module.has_gate:
        yield names.matrices[0], names.first, (expert,)
    else:
        rows = module.get_parameter(names.first).shape[2 if module.is_transposed else 1] // 2
        halves = (slice(0, rows), slice(rows, 2 * rows)) if module.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
        for matrix, half in zip(names.matrices, halves, strict=True):
            yield matrix, names.first, (expert, slice(None), half) if module.is_transposed else (expert, half)
    yield names.last, names.last, (expert,)


@contextmanager
def observable(model: nn.Module, *, all_tokens: bool = False) -> Iterator[None]:
    """Have the model run as steps need it: with fast attention, and with experts whose sites can be watched; with `all_tokens`,
    each is shown every token.
    """
    experts: list[Experts] = [module for module in model.modules() if is_experts(module)]
    before = [module.config._experts_implementation for module in experts]
    for module in experts:
        module.config._experts_implementation = _FORWARD
        setattr(module, _ALL, all_tokens)
    try:
        with fast_attention():
            yield
    finally:
        for module, implementation in zip(experts, before, strict=True):
            module.config._experts_implementation = implementation
            delattr(module, _ALL)


def _forward(self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states (tokens, width); top_k_index, top_k_weights (tokens, k). An expert that no token chose runs on none."""
    out, names = torch.zeros_like(hidden_states), _names(self)
    everyone = torch.arange(len(hidden_states), device=hidden_states.device) if getattr(self, _ALL) else None
    for expert in range(self.num_experts):
        choice, chosen = torch.where((top_k_index == expert).T)
        tokens = chosen if everyone is None else everyone
        x = hidden_states[tokens]
        show(self, (expert, OUTER), x, tokens)
        inner = _linear(self, names.first, expert, x)
        inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
        show(self, (expert, INNER), inner, tokens)
        y = _linear(self, names.last, expert, inner if everyone is None else inner[chosen])
        out.index_add_(0, chosen, (y * top_k_weights[chosen, choice, None]).to(out.dtype))
    return out


def _linear(module: Experts, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    if not module.is_transposed:
        return functional.linear(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias


ALL_EXPERTS_FUNCTIONS.register(_FORWARD, _forward)
