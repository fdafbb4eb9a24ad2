"""Which channels of a model may change without changing what that computes, and where they are to be seen.

Three kinds. `neurons`: rows of what makes a feed-forward part's inner values, columns of what reads them. `values`: channels of
a head's values, rows of v and columns of o, the same in all heads that share them. `hidden`: the hidden states' channels, of
every parameter of the model that reads or writes them. That the outputs stay the same is not assumed from names: the block is
run both ways. A basis is an order of the channels, or a rotation, as in `Move`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.models.families import ATTENTION, FEED_FORWARD
from llmprune.models.groups import Group, bias_name
from llmprune.models.heads import Heads
from llmprune.models.sites import Block, Site
from llmprune.steps.channels.moves import Move, Moves, joined

_WRITERS = {row.consumer for row in (*FEED_FORWARD, *ATTENTION)}  # names of what writes to the hidden states


def of_rows(block: Block, site: Site, basis: Tensor) -> Moves:
    """The site's rows, and its bias."""
    found: Moves = {site.parameter: [Move(basis, 1 if site.transposed else 0, site.part)]}
    if not site.part and getattr(site.module, "bias", None) is not None:
        found[f"{block.name}.{bias_name(site, block)}"] = [Move(basis, 0)]
    return found


def of_columns(site: Site, basis: Tensor) -> Moves:
    return {site.parameter: [Move(basis, columns_of(site), site.part)]}


def columns_of(site: Site) -> int:
    """The dimension of its part of the parameter that its columns are."""
    return 0 if site.transposed else 1


def of_neurons(block: Block, group: Group, order: Tensor) -> Moves:
    """Neurons in a new order."""
    return joined([of_columns(group.consumer, order), *(of_rows(block, site, order) for site in group.producers)])


def of_values(block: Block, group: Group, layout: Heads, basis: Tensor) -> Moves:
    """Channels of values, each head's within it: in a new order (heads of values, width), or rotated (heads of values, width,
    width)."""
    _, _, values = group.producers
    reading = basis.repeat_interleave(layout.query // layout.value, 0)
    if basis.ndim == 2:
        basis, reading = (_within(orders, layout.width) for orders in (basis, reading))
    return joined([of_rows(block, values, basis), of_columns(group.consumer, reading)])


def _within(orders: Tensor, width: int) -> Tensor:
    """The order of all heads' channels, of each head's."""
    return (torch.arange(len(orders))[:, None] * width + orders).flatten()


def readers(block: Block, width: int) -> list[Site]:
    """Sites that read the hidden states."""
    return [site for site in block.sites if site.columns == width and not _writes(site)]


def writers(block: Block, width: int) -> list[Site]:
    """Sites that write to the hidden states."""
    return [site for site in block.sites if site.rows == width and _writes(site)]


def of_hidden(block: Block, width: int, basis: Tensor) -> Moves:
    """The hidden states' channels, in all of a block but its norms."""
    found = [of_columns(site, basis) for site in readers(block, width)]
    found += [of_rows(block, site, basis) for site in writers(block, width)]
    found += [{name: [Move(basis, parameter.ndim - 1)]} for name, parameter in others(block, width) if parameter.ndim > 1]
    return joined(found)


def of_norms(block: Block, width: int, order: Tensor, *, inner: bool) -> Moves:
    """The same in a block's norms; `inner`: also in those further down than the block's own children, which may be of queries
    and keys instead, as many as hidden channels."""
    found = (name for name, parameter in others(block, width) if parameter.ndim == 1)
    return {name: [Move(order, 0)] for name in found if inner or name.removeprefix(f"{block.name}.").count(".") < 2}


def others(block: Block, width: int) -> list[tuple[str, Tensor]]:
    """Parameters of the block with hidden channels last that are no site's: norms, and what chooses experts."""
    known = {site.parameter for site in block.sites} | {f"{block.name}.{bias_name(site, block)}" for site in block.sites}
    named = ((f"{block.name}.{path}", parameter) for path, parameter in block.module.named_parameters())
    return [(name, parameter) for name, parameter in named if name not in known and parameter.shape[-1] == width]


def of_outside(model: PreTrainedModel, names: Iterable[str], width: int, basis: Tensor) -> Moves:
    """The same outside the blocks: embeddings, the last norm, the head, of which `names` are there.

    Raises:
        InputError: it cannot be told which dimension of a parameter that is.
    """
    tables = _tables(model)
    found: Moves = {}
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in ((name, own[name]) for name in names if name in own):
        places = [dim for dim, size in enumerate(parameter.shape) if size == width]
        if any(parameter is table for table in tables):
            places = [1]
        if len(places) > 1:
            raise InputError(f"{name} has {width} channels both ways")
        if places:
            found[name] = [Move(basis, places[0])]
    return found


def _tables(model: PreTrainedModel) -> Sequence[Tensor]:
    """The embeddings' parameters and the head's, (tokens, width)."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module.get_parameter("weight") for module in modules if isinstance(module, (nn.Embedding, nn.Linear))]


def _writes(site: Site) -> bool:
    return site.name.rpartition(".")[2] in _WRITERS
