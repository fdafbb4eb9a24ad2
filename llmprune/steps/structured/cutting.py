"""Smaller blocks: what stays of each tensor is put into the block that transformers build."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.models.groups import bias_name
from llmprune.models.sites import Block, Site
from llmprune.models.target import Target
from llmprune.steps.structured.sizes import Sizes


def check_fit(block: Block, smaller: Block, sizes: Sizes) -> None:
    """The block that transformers build must have the sizes that it is to have.

    Raises:
        InputError: it has others.
    """
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    for group in (group for step in sizes.steps(block) for group in step):
        stay = sizes.stay(group)
        columns[group.consumer.name] = group.consumer.columns * stay // group.count
        rows |= {site.name: site.rows * stay // group.count for site in group.producers}
    for old, new in zip(block.sites, smaller.sites, strict=True):
        wanted = (rows.get(old.name, old.rows), columns.get(old.name, old.columns))
        if (new.rows, new.columns) != wanted:
            raise InputError(
                f"transformers do not load {block.name.rpartition('.')[0]} of that size: the configuration has no number that "
                f"makes {old.name} {wanted[0]} x {wanted[1]}"
            )
    biases = {bias_name(site, block): rows[site.name] for site in block.sites if site.name in rows and not site.part}
    own = {site.parameter for site in block.sites}
    for path, parameter in block.module.named_parameters():
        shape, built = list(parameter.shape), list(smaller.module.get_parameter(path).shape)
        if f"{block.name}.{path}" not in own and built != ([biases[path]] if path in biases else shape):
            raise InputError(f"{block.name}.{path} of {shape} has no place in a smaller block, which would have {built}")


def cut_block(block: Block, rows: dict[str, Tensor], columns: dict[str, Tensor], target: Target) -> Block:
    """The target's block with what stays of this one."""
    found = target.empty(block.index)
    biases = {bias_name(site, block): rows[site.name] for site in block.sites if site.name in rows and not site.part}
    for path, parameter in block.module.named_parameters():
        if any(site.parameter == f"{block.name}.{path}" for site in block.sites):
            continue
        value = parameter.data[biases[path]] if path in biases else parameter.data
        _put(f"{block.name}.{path}", value, found.module.get_parameter(path).data)
    for old, new in zip(block.sites, found.sites, strict=True):
        weight = old.weight[rows[old.name]] if old.name in rows else old.weight
        _put(old.name, weight[:, columns[old.name]] if old.name in columns else weight, new.weight)
    return found


def _put(name: str, value: Tensor, into: Tensor) -> None:
    if value.shape != into.shape:
        raise InputError(
            f"{name} of {list(value.shape)} does not fit a smaller block's {list(into.shape)}: it cannot be removed from"
        )
    into.copy_(value)


def bias_of(block: Block, site: Site) -> Tensor:
    return block.module.get_parameter(bias_name(site, block)).data


def members(kept: Tensor, count: int, size: int) -> Tensor:
    """The rows or columns, of `size`, that belong to the parts `kept` of `count`."""
    return torch.arange(size, device=kept.device).view(count, -1)[kept].flatten()
