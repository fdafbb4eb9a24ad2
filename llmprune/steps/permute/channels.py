"""What may change its order in a model without changing what that computes, and where the order is to be seen.

Three kinds. `neurons`: rows of what makes a feed-forward part's inner values, columns of what reads them. `values`: channels of
a head's values, rows of v and columns of o, the same in all heads that share them. `hidden`: the hidden states' channels, of
every parameter of the model that reads or writes them. That an order leaves the outputs alone is not assumed from names: the
block is run both ways.
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
from llmprune.steps.permute.moves import Move, Moves, joined

_WRITERS = {row.consumer for row in (*FEED_FORWARD, *ATTENTION)}  # names of what writes to the hidden states


def of_rows(block: Block, site: Site, order: Tensor) -> Moves:
    """The site's rows, and its bias."""
    found = {site.parameter: [Move(order, 1 if site.transposed else 0, site.part)]}
    if not site.part and getattr(site.module, "bias", None) is not None:
        found[f"{block.name}.{bias_name(site, block)}"] = [Move(order, 0)]
    return found


def of_columns(site: Site, order: Tensor) -> Moves:
    return {site.parameter: [Move(order, 0 if site.transposed else 1, site.part)]}


def of_neurons(block: Block, group: Group, order: Tensor) -> Moves:
    """Neurons in a new order."""
    return joined([of_columns(group.consumer, order), *(of_rows(block, site, order) for site in group.producers)])


def of_values(block: Block, group: Group, layout: Heads, orders: Tensor) -> Moves:
    """Channels of values in a new order, (heads of values, width), each within its head."""
    _, _, values = group.producers
    starts = torch.arange(layout.value)[:, None] * layout.width
    shared = layout.query // layout.value
    reading = torch.arange(layout.query)[:, None] * layout.width + orders.repeat_interleave(shared, 0)
    return joined([of_rows(block, values, (starts + orders).flatten()), of_columns(group.consumer, reading.flatten())])


def readers(block: Block, width: int) -> list[Site]:
    """Sites that read the hidden states."""
    return [site for site in block.sites if site.columns == width and not _writes(site)]


def of_hidden(block: Block, width: int, order: Tensor, *, inner: bool = True) -> Moves:
    """The hidden states' channels in a new order, in all of a block; `inner`: also in norms further down than the block's own
    children, which may be of queries and keys instead, as many as hidden channels."""
    found = [of_columns(site, order) for site in readers(block, width)]
    found += [of_rows(block, site, order) for site in block.sites if site.rows == width and _writes(site)]
    known = {site.parameter for site in block.sites} | {f"{block.name}.{bias_name(site, block)}" for site in block.sites}
    for path, parameter in block.module.named_parameters():
        name = f"{block.name}.{path}"
        outer = parameter.ndim > 1 or inner or path.count(".") < 2
        if name not in known and parameter.shape[-1] == width and outer:  # norms, and what chooses experts
            found.append({name: [Move(order, parameter.ndim - 1)]})
    return joined(found)


def of_outside(model: PreTrainedModel, names: Iterable[str], width: int, order: Tensor) -> Moves:
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
            found[name] = [Move(order, places[0])]
    return found


def _tables(model: PreTrainedModel) -> Sequence[Tensor]:
    """The embeddings' parameters and the head's, (tokens, width)."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module.get_parameter("weight") for module in modules if isinstance(module, (nn.Embedding, nn.Linear))]


def _writes(site: Site) -> bool:
    return site.name.rpartition(".")[2] in _WRITERS
