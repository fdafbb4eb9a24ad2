"""One pass over the dense model that finds the orders, and tries them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.base.precision import full_float32
from llmprune.data.windows import Windows
from llmprune.job.job import Job
from llmprune.models.experts import observable
from llmprune.models.groups import heads, neurons
from llmprune.models.heads import Heads
from llmprune.models.sites import Block, Stage
from llmprune.numerics.grouping import Costs, Order, find_order
from llmprune.numerics.patterns import NM
from llmprune.numerics.stats import Gram, InputSample
from llmprune.steps.base import Feeds, Nowhere, Work
from llmprune.steps.permute.channels import of_hidden, of_neurons, of_outside, of_values, readers
from llmprune.steps.permute.moves import Moves, in_place, joined
from llmprune.steps.weights.observing import Observed, add_up, passes, traced
from llmprune.stream.activations import Activations
from llmprune.stream.capture import head
from llmprune.stream.engine import stream

ROWS = 1024  # of a matrix, drawn at random, on which its order is decided
UNKNOWN = {
    "neurons": "no feed-forward part is known by the names of its matrices",
    "values": "no attention is known by its names that has q, k, v and o as matrices of their own",
}
Found = tuple[Moves, list[Order]]
CHANGED = "what it computes depends on their order"
SAME = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative error from adding up in another order


@dataclass(slots=True)
class Looked:
    """What was found.

    Attributes:
        costs: of masks, before and after, by kind; each matrix's as a share of the energy of what it puts out.
        left: kinds, or blocks of them, that keep their order, and why.
    """

    moves: Moves = field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, moves: Moves, orders: Sequence[Order]) -> None:
        """Count what was found of a kind."""
        self.moves = joined([self.moves, moves])
        before, after = self.costs.get(kind, (0.0, 0.0))
        self.costs[kind] = before + sum(order.before for order in orders), after + sum(order.after for order in orders)


@dataclass(slots=True)
class Looking:
    """Finds the orders for a model.

    Attributes:
        describe: the model's blocks, whether their weights are loaded or not.
        outside: names of its tensors that are in no block.
        sites: names of those that are to have the pattern.
    """

    job: Job
    work: Work
    describe: Callable[[], Iterable[Block]]
    outside: Sequence[str]
    pattern: NM
    sites: frozenset[str]
    found: Looked = field(default_factory=Looked)
    _random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    _hidden: list[Costs] = field(default_factory=list)
    width: int = field(init=False)
    trial: Tensor = field(init=False)
    _inner: list[bool] = field(default_factory=list)  # which norms have hidden channels, block by block

    def look(self, windows: Windows) -> Looked:
        """Run the dense model on `windows` once."""
        job, work = self.job, self.work
        batch = job.batch(windows.ids.shape[1], work.device)
        self.width = work.model.config.get_text_config().hidden_size
        self.trial = torch.randperm(self.width, generator=self._random)
        share = windows.share(job.ranks.rank, job.ranks.size)

        with work.outside(), job.clock("capture"):
            feed = work.record(share, batch)
            self._try_outside(feed, share)
        job.progress.start(len(work.blocks), 0)
        with observable(work.model, all_tokens=job.config.all_experts):
            feeds = Feeds(feed, None, len(work.blocks) - 1, job.progress, job.clock)
            stream(work.source, feeds, Nowhere(), lambda block: self._visit(block, feed))
        self._order_hidden()
        return self.found

    def _visit(self, block: Block, feed: Activations) -> None:
        costs = self._costs(block, feed)
        for kind, find in {"neurons": self._neurons, "values": self._values}.items():
            try:
                moves, orders = find(block, costs)
            except InputError:
                self.found.left[f"{kind} of {block.name}"] = UNKNOWN[kind]
                continue
            if moves and self._same(block, feed, moves):
                self.found.add(kind, moves, orders)
            elif moves:
                self.found.left[f"{kind} of {block.name}"] = CHANGED
        if "hidden" in self.found.left:
            return
        inner = next((inner for inner in (True, False) if self._same(block, feed, self._trial(block, inner), self.trial)), None)
        if inner is None:
            self.found.left["hidden"] = f"of {block.name}: {CHANGED}"
            return
        self._inner.append(inner)
        self._hidden += [costs[site.name] for site in readers(block, self.width) if site.name in costs]

    def _trial(self, block: Block, inner: bool) -> Moves:
        """The block's hidden channels in the order that is tried."""
        return of_hidden(block, self.width, self.trial, inner=inner)

    @full_float32()
    def _costs(self, block: Block, feed: Activations) -> dict[str, Costs]:
        """By stage, under the name of its first planned site: of some rows of its sites, as shares of what each puts out."""
        job = self.job
        with job.clock("forward"):
            every, _ = traced(feed, block, job.ranks)
        stages = [[site for site in stage if site.name in self.sites] for stage in every]
        found: dict[str, Costs] = {}
        for group in passes([stage for stage in stages if stage]):
            with job.clock("forward"):
                observed = feed.collect(block, group, self._observe)
            add_up(group, observed, job.ranks)
            with job.clock("solve"):
                for stage, seen in zip(group, observed, strict=True):
                    assert isinstance(seen.statistic, Gram)
                    if rows := self._rows(stage, seen.statistic):
                        found[stage[0].name] = Costs.of(torch.cat(rows), seen.statistic.mean())
        return found

    def _rows(self, stage: Stage, gram: Gram) -> list[Tensor]:
        """Some rows of each site, scaled so that all of it puts out an energy of 1 a token; of those that put out any."""
        found = []
        for site in stage:
            rows = torch.randperm(site.rows, generator=self._random)[:ROWS].to(site.weight.device)
            some = site.weight[rows].float()
            _, energy = gram.errors(some, torch.zeros_like(some))
            if energy > 0:
                found.append(some * (gram.tokens / energy) ** 0.5)
        return found

    def _observe(self, stage: Stage, device: torch.device) -> Observed:
        return Observed(Gram(stage[0].columns, device), InputSample(1), None, self.job.clock)

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
        if cost is None or layout.width % self.pattern.m:
            return {}, []
        shared = layout.query // layout.value
        places = torch.arange(layout.query * layout.width, device=cost.unit.device).view(layout.value, shared, -1)
        orders = [self._find([cost.part(own) for own in sharing]) for sharing in places]
        return of_values(block, group, layout, torch.stack([order.columns for order in orders])), orders

    def _find(self, costs: Sequence[Costs]) -> Order:
        """An order of the columns of `costs`, the same in all processes."""
        with self.job.clock("solve"):
            order = find_order(costs, self.pattern, self._random)
        columns = order.columns.cpu()
        self.job.ranks.of(0, columns)
        return replace(order, columns=columns)

    def _same(self, block: Block, feed: Activations, moves: Moves, order: Tensor | None = None) -> bool:
        """Whether the block puts out the same on the first batch, in the order of the hidden states if that is changed."""
        with self.job.clock("probe"):
            hidden = feed.hidden[0]
            before = feed.call(block, 0, block.module)
            given = feed if order is None else feed.at([hidden[..., order]])
            with in_place(block.module, moves, f"{block.name}."):
                after = given.call(block, 0, block.module)
            wanted = before if order is None else before[..., order.to(before.device)]
        return bool(self.job.ranks.agree(near(feed.real_tokens(after, 0), feed.real_tokens(wanted, 0))))

    def _try_outside(self, feed: Activations, windows: Windows) -> None:
        """Run what is outside the blocks both ways on a window."""
        work, blocks = self.work, list(self.work.blocks.values())
        some = windows.first(windows.ids.shape[1], 1)
        inputs = next(iter(some.batches(1, work.device)))
        positions = torch.arange(some.ids.shape[1])

        def ends(order: Tensor | None) -> Sequence[Tensor]:
            hidden = work.record(some, 1).hidden[0]
            first = feed.hidden[0][:1].to(work.device)
            out = head(work.model, blocks, first if order is None else first[..., order], positions, **inputs)
            return hidden if order is None else hidden[..., torch.argsort(order)], out

        try:
            moves = of_outside(work.model, self.outside, self.width, self.trial)
            before = ends(None)
            with in_place(work.model, moves):
                after = ends(self.trial)
        except InputError as problem:
            self.found.left["hidden"] = str(problem)
            return
        if not self.job.ranks.agree(all(near(one, other) for one, other in zip(after, before, strict=True))):
            self.found.left["hidden"] = f"of what is outside the blocks: {CHANGED}"

    def _order_hidden(self) -> None:
        if "hidden" in self.found.left or not self._hidden:
            return
        if self.width % self.pattern.m:
            self.found.left["hidden"] = f"{self.width} channels do not fall into groups of {self.pattern.m}"
            return
        order = self._find(self._hidden)
        blocks = zip(self.describe(), self._inner, strict=True)
        inside = [of_hidden(block, self.width, order.columns, inner=inner) for block, inner in blocks]
        outside = of_outside(self.work.model, self.outside, self.width, order.columns)
        self.found.add("hidden", joined([*inside, outside]), [order])


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by no more than adding up in another order makes."""
    difference = (one.float() - other.float()).norm() / other.float().norm()
    return bool(difference <= SAME[one.dtype])
