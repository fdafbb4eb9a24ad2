"""Find the decoder blocks of a model and the prunable matrices of a block, without knowing the family."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from llmprune.errors import InputError
from llmprune.models.sites import Block, Site


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder stack, in order, by full module name: the longest list of gradient-checkpointing layers.

    Raises:
        InputError: the model has none.
    """
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if not stacks:
        raise InputError(
            f"found no decoder blocks in {type(model).__name__}: looked for an nn.ModuleList of GradientCheckpointingLayer"
        )
    name, stack = max(stacks, key=lambda item: len(item[1]))
    return {f"{name}.{index}": layer for index, layer in enumerate(stack)}


def make_block(index: int, name: str, module: nn.Module, storage: Mapping[str, torch.dtype]) -> Block:
    """Describe a loaded block; `storage` gives the dtype on disk of a weight, by full parameter name."""
    sites = [
        Site(f"{name}.{path}", layer, isinstance(layer, Conv1D), storage[f"{name}.{path}.weight"])
        for path, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D))
    ]
    return Block(index, name, module, sites)


def unreached(block: Block) -> dict[str, str]:
    """Matrices of a block that are no site, and why: name -> reason."""
    owned = {f"{site.name}.weight" for site in block.sites}
    return {
        f"{block.name}.{name}": f"{parameter.ndim}-D weight of no linear layer"
        for name, parameter in block.module.named_parameters()
        if parameter.ndim > 1 and f"{block.name}.{name}" not in owned
    }
