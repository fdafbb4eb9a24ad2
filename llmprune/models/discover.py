"""Find the decoder blocks of a model and the prunable matrices of a block; only routers are known by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from llmprune.base.errors import InputError
from llmprune.models.experts import expert_sites, is_experts
from llmprune.models.families import ROUTERS
from llmprune.models.sites import Block, Site

ROUTER = "router"  # why a matrix is no site
_ROUTERS = frozenset(row.name for row in ROUTERS)  # they choose experts; small, and never pruned


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder stack, in order, by full module name: the longest list of gradient-checkpointing layers.

    In a model that says which part of it is the text decoder, only that part is searched.

    Raises:
        InputError: the model has none.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    names = {module: name for name, module in model.named_modules()}
    stacks = [
        module
        for module in (decoder if decoder in names else model).modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if not stacks:
        raise InputError(
            f"found no decoder blocks in {type(model).__name__}: looked for an nn.ModuleList of GradientCheckpointingLayer"
        )
    stack = max(stacks, key=len)
    return {f"{names[stack]}.{index}": layer for index, layer in enumerate(stack)}


def make_block(index: int, name: str, module: nn.Module, storage: Mapping[str, torch.dtype]) -> Block:
    """Describe a loaded block; `storage` gives the dtype on disk of a weight, by full parameter name."""
    sites: list[Site] = []
    for path, layer in module.named_modules(prefix=name):
        if is_experts(layer):
            sites += expert_sites(path, layer, {own: storage[f"{path}.{own}"] for own, _ in layer.named_parameters()})
        elif isinstance(layer, (nn.Linear, Conv1D)) and path.rsplit(".", 1)[-1] not in _ROUTERS:
            weight = f"{path}.weight"
            sites.append(Site(path, layer, weight, isinstance(layer, Conv1D), storage[weight]))
    return Block(index, name, module, sites, storage)


def unreached(block: Block) -> dict[str, str]:
    """Matrices of a block that are no site, and why: name -> reason."""
    owned = {site.parameter for site in block.sites}

    def why(name: str, parameter: nn.Parameter) -> str:
        if name.split(".")[-2:][0] in _ROUTERS:
            return ROUTER
        return "bias" if name.endswith("bias") else f"{parameter.ndim}-D, of no linear layer"

    return {
        f"{block.name}.{name}": why(name, parameter)
        for name, parameter in block.module.named_parameters()
        if parameter.ndim > 1 and f"{block.name}.{name}" not in owned
    }
