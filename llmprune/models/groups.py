"""Which matrices of a block are coupled, so that rows of some make what columns of another read.

Found by the names in `models/families.py`. Neurons: gate and up make what down reads, in each expert too. Heads:
q, k and v make what o reads; only where they are separate matrices, since all models that load with fewer heads than
their width asks for have them so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llmprune.base.errors import InputError
from llmprune.models.families import ATTENTION, FEED_FORWARD
from llmprune.models.heads import Heads
from llmprune.models.sites import Block, Site

Kind = Literal["neurons", "heads"]


@dataclass(frozen=True, slots=True)
class Group:
    """A consumer, and those whose rows make its inputs.

    Attributes:
        producers: each with the rows that belong to one of the `count` parts.
        count: heads, groups of heads with common keys and values, or neurons.
        bundles: consecutive parts fall into so many bundles, and each must keep the same number.
        each: how many heads of the model, or neurons, a part is.
    """

    kind: Kind
    consumer: Site
    producers: Sequence[Site]
    count: int
    bundles: int = 1
    each: int = 1


def neurons(block: Block) -> list[Group]:
    """The block's feed-forward groups: one, or one an expert.

    Raises:
        InputError: none is known.
    """
    found = [group for sites in _siblings(block).values() for group in _feed_forward(sites)]
    if not found:
        looked = ", ".join(row.consumer for row in FEED_FORWARD)
        raise InputError(f"found no neurons to remove in {block.name}: looked for {looked}")
    return found


def heads(block: Block, layout: Heads, *, whole: bool) -> Group:
    """The block's attention: by groups of query heads with common keys and values if `whole`, else by query heads, as many
    in each group.

    Raises:
        InputError: it is laid out in a way that is not known.
    """
    for sites in _siblings(block).values():
        row = next((row for row in ATTENTION if {*row.producers, row.consumer} <= sites.keys()), None)
        if row is None:
            continue
        out, (q, k, v) = sites[row.consumer], (sites[name] for name in row.producers)
        if (q.rows, k.rows, v.rows, out.columns) == tuple(
            count * layout.width for count in (layout.query, layout.value, layout.value, layout.query)
        ):
            if whole:
                return Group("heads", out, (q, k, v), layout.value, each=layout.query // layout.value)
            return Group("heads", out, (q,), layout.query, layout.value)
    raise InputError(f"the heads of {block.name} cannot be removed: looked for separate q, k, v and o of {layout}")


def _siblings(block: Block) -> dict[str, dict[str, Site]]:
    """Sites by the module, or expert, that they belong to, and their own names."""
    found: dict[str, dict[str, Site]] = {}
    for site in block.sites:
        parent, _, name = site.name.rpartition(".")
        found.setdefault(parent, {})[name] = site
    return found


def _feed_forward(sites: dict[str, Site]) -> Iterator[Group]:
    for row in FEED_FORWARD:
        if {*row.producers, row.consumer} <= sites.keys():
            producers, consumer = [sites[name] for name in row.producers], sites[row.consumer]
            if all(site.rows == consumer.columns for site in producers):
                yield Group("neurons", consumer, producers, consumer.columns)
                return


def bias_name(site: Site, block: Block) -> str:
    """What the block calls the bias of the site's module, if that has one."""
    return site.parameter.removeprefix(f"{block.name}.").rpartition(".")[0] + ".bias"
