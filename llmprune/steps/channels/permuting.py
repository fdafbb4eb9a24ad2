"""Orders of neurons, channels of values and hidden channels in which an N:M mask costs less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.models.groups import heads, neurons
from llmprune.models.heads import Heads
from llmprune.models.sites import Block, Site
from llmprune.numerics.grouping import SEARCH, Costs, Order, find_order
from llmprune.numerics.stats import Gram
from llmprune.steps.channels.looking import CHANGED, NO_ATTENTION, ROWS, Looking, gathered
from llmprune.steps.channels.moves import Moves, joined
from llmprune.steps.channels.places import of_hidden, of_neurons, of_norms, of_outside, of_values, readers
from llmprune.stream.activations import Activations

UNKNOWN = {"neurons": "no feed-forward part is known by the names of its matrices", "values": NO_ATTENTION}
Found = tuple[Moves, list[Order]]


@dataclass(slots=True)
class Permuting(Looking):
    """Finds orders. Which columns are neighbours decides what an N:M mask can keep."""

    _hidden: list[Costs] = field(default_factory=list)
    _inner: list[bool] = field(default_factory=list)  # which norms have hidden channels, block by block

    @classmethod
    def burden(cls, blocks: Sequence[Block], width: int) -> tuple[int, float]:
        weights = sum(min(site.rows, ROWS) * site.columns for block in blocks for site in block.sites)
        return sum(gathered(block, width)[1] for block in blocks), SEARCH * weights

    def drawn_basis(self) -> Tensor:
        return torch.randperm(self.width, generator=self.random)

    def outer(self, basis: Tensor) -> Moves:
        return of_outside(self.work.model, self.outside, self.width, basis)

    def visit(self, block: Block, feed: Activations) -> None:
        costs = self._costs(block, feed)
        for kind, find in {"neurons": self._neurons, "values": self._values}.items():
            try:
                moves, orders = find(block, costs)
            except InputError:
                self.found.left[f"{kind} of {block.name}"] = UNKNOWN[kind]
                continue
            if moves and self.same(block, feed, moves):
                self.found.add(kind, moves, orders)
            elif moves:
                self.found.left[f"{kind} of {block.name}"] = CHANGED
        if "hidden" in self.found.left:
            return
        ways = {inner: self._ordered(block, self.trial, inner) for inner in (True, False)}
        inner = next((inner for inner, moves in ways.items() if self.same(block, feed, moves, self.trial)), None)
        if inner is None:
            self.found.left["hidden"] = f"of {block.name}: {CHANGED}"
            return
        self._inner.append(inner)
        self._hidden += [costs[site.name] for site in readers(block, self.width) if site.name in costs]

    def finish(self) -> None:
        if not self._hidden:
            return
        order = self._find(self._hidden)
        blocks = zip(self.describe(), self._inner, strict=True)
        inside = [self._ordered(block, order.columns, inner) for block, inner in blocks]
        self.found.add("hidden", joined([*inside, self.outer(order.columns)]), [order])

    def _ordered(self, block: Block, order: Tensor, inner: bool) -> Moves:
        """The block's hidden channels in an order."""
        return joined([of_hidden(block, self.width, order), of_norms(block, self.width, order, inner=inner)])

    def _costs(self, block: Block, feed: Activations) -> dict[str, Costs]:
        """By stage, under the name of its first planned site: of some rows of its sites, as shares of what each puts out."""
        found: dict[str, Costs] = {}

        def take(stage: Sequence[Site], gram: Gram) -> None:
            with self.job.clock("solve"):
                if rows := [own for site in stage if (own := self.rows(site, gram)) is not None]:
                    found[stage[0].name] = Costs.of(torch.cat(rows), gram.mean())

        self.each_stage(block, feed, take)
        return found

    def _neurons(self, block: Block, costs: dict[str, Costs]) -> Found:
        """Raises: InputError: the block has none that are known."""
        groups = [group for group in neurons(block) if group.consumer.name in costs]
        orders = [self._find([costs[group.consumer.name]]) for group in groups]
        moves = [of_neurons(block, group, order.columns) for group, order in zip(groups, orders, strict=True)]
        return joined(moves), orders

    def _values(self, block: Block, costs: dict[str, Costs]) -> Found:
        """Raises: InputError: the block's attention has none that are known."""
        layout = Heads.of(self.work.model.config)
        group = heads(block, layout, whole=True)
        cost = costs.get(group.consumer.name)
        if cost is None or layout.width % self.mask.size:
            return {}, []
        shared = layout.query // layout.value
        places = torch.arange(layout.query * layout.width, device=cost.unit.device).view(layout.value, shared, -1)
        orders = [self._find([cost.part(own) for own in sharing]) for sharing in places]
        return of_values(block, group, layout, torch.stack([order.columns for order in orders])), orders

    def _find(self, costs: Sequence[Costs]) -> Order:
        """An order of the columns of `costs`, the same in all processes."""
        with self.job.clock("solve"):
            order = find_order(costs, self.mask.size, self.mask.drop, self.random)
        columns = order.columns.cpu()
        self.job.ranks.of(0, columns)
        return replace(order, columns=columns)
