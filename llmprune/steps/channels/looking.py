"""One pass over the dense model that finds what becomes of its channels, and tries it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.base.precision import full_float32
from llmprune.data.windows import Windows
from llmprune.job.job import Job
from llmprune.job.recipes import SCANNING
from llmprune.models.experts import observable
from llmprune.models.sites import Block, Site, Stage
from llmprune.numerics.rotation import Mask
from llmprune.numerics.stats import Gram, InputSample
from llmprune.steps.base import Feeds, Load, Nowhere, Work
from llmprune.steps.channels.moves import Move, Moves, in_place, joined, moved
from llmprune.steps.channels.places import readers
from llmprune.steps.weights.observing import Observed, add_up, passes, traced
from llmprune.stream.activations import Activations
from llmprune.stream.capture import head
from llmprune.stream.engine import stream

ROWS = 1024  # of a matrix, drawn at random, on which is decided
CHANGED = "what it computes depends on them"
NO_ATTENTION = "no attention is known by its names that has q, k, v and o as matrices of their own"
SAME = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative error from adding up in another order


@dataclass(slots=True)
class Looked:
    """What was found.

    Attributes:
        copies: parameters that are no longer tied, and what each begins as.
        costs: of masks, before and after, by kind; each matrix's as a share of the energy of what it puts out.
        left: kinds, or blocks of them, that stay as they are, and why.
    """

    moves: Moves = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, moves: Moves, results: Sequence[Any]) -> None:
        """Count what was found of a kind; what masks cost is `before` and `after` of each result."""
        self.moves = joined([self.moves, moves])
        before, after = self.costs.get(kind, (0.0, 0.0))
        self.costs[kind] = before + sum(own.before for own in results), after + sum(own.after for own in results)


@dataclass(slots=True)
class Looking(ABC):
    """Finds what becomes of a model's channels.

    Attributes:
        describe: the model's blocks, whether their weights are loaded or not.
        outside: names of its tensors that are in no block.
        sites: names of those that are to have the pattern.
        mask: what the pattern drops.
        trial: the basis of hidden channels on which it is tried whether the model computes the same.
    """

    job: Job
    work: Work
    describe: Callable[[], Iterable[Block]]
    outside: Sequence[str]
    sites: frozenset[str]
    mask: Mask
    found: Looked = field(default_factory=Looked)
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    width: int = field(init=False)
    trial: Tensor = field(init=False)

    def look(self, windows: Windows) -> Looked:
        """Run the dense model on `windows` once."""
        job, work = self.job, self.work
        batch = job.batch(windows.ids.shape[1], work.device)
        self.width = work.model.config.get_text_config().hidden_size
        self.trial = self.drawn_basis()
        share = windows.share(job.ranks.rank, job.ranks.size)
        if self.width % self.mask.size:
            self.found.left["hidden"] = f"{self.width} channels do not fall into groups of {self.mask.size}"

        with work.outside(), job.clock("capture"):
            feed = work.record(share, batch)
            self._try_outside(feed, share)
        job.progress.start(len(work.blocks), 0)
        with observable(work.model, all_tokens=job.config.all_experts):
            feeds = Feeds(feed, None, len(work.blocks) - 1, job.progress, job.clock)
            stream(work.source, feeds, Nowhere(), lambda block: self.visit(block, feed))
        if "hidden" not in self.found.left:
            self.finish()
        return self.found

    @abstractmethod
    def drawn_basis(self) -> Tensor:
        """Any basis of the hidden channels."""

    @abstractmethod
    def visit(self, block: Block, feed: Activations) -> None:
        """Find what becomes of the channels within a block, and what it says about the hidden ones."""

    @abstractmethod
    def finish(self) -> None:
        """Find what becomes of the hidden channels."""

    @abstractmethod
    def outer(self, basis: Tensor) -> Moves:
        """The hidden channels outside the blocks.

        Raises:
            InputError: they cannot be told.
        """

    def apart(self) -> AbstractContextManager[Any]:
        """What is outside the blocks, as `outer` takes it to be, for a while."""
        return nullcontext()

    @classmethod
    def load(cls, blocks: Sequence[Block], width: int) -> Load:
        """What it asks of the machine where `blocks` have so many hidden channels."""
        kept, operations = cls.burden(blocks, width)
        return Load(SCANNING, evaluates=False, gathered=kept, operations=operations)

    @classmethod
    @abstractmethod
    def burden(cls, blocks: Sequence[Block], width: int) -> tuple[int, float]:
        """Bytes of what it gathers from all blocks, and floating-point operations on it."""

    @full_float32()
    def each_stage(self, block: Block, feed: Activations, take: Callable[[Sequence[Site], Gram], None]) -> None:
        """Hand on the sites of each stage, and the Gram of their inputs."""
        job = self.job
        with job.clock("forward"):
            every, _ = traced(feed, block, job.ranks)
        stages = [[site for site in stage if site.name in self.sites] for stage in every]
        for group in passes([stage for stage in stages if stage]):
            with job.clock("forward"):
                observed = feed.collect(block, group, self._observe)
            add_up(group, observed, job.ranks)
            for stage, seen in zip(group, observed, strict=True):
                assert isinstance(seen.statistic, Gram)
                take(stage, seen.statistic)

    def rows(self, site: Site, gram: Gram) -> Tensor | None:
        """Some rows of a site, drawn at random, as `scaled`."""
        drawn = torch.randperm(site.rows, generator=self.random)[:ROWS].to(site.weight.device)
        return scaled(site.weight[drawn], gram)

    def _observe(self, stage: Stage, device: torch.device) -> Observed:
        return Observed(Gram(stage[0].columns, device), InputSample(1), None, self.job.clock)

    def same(self, block: Block, feed: Activations, moves: Moves, basis: Tensor | None = None) -> bool:
        """Whether the block puts out the same on the first batch, in the basis of the hidden states if that is changed."""
        with self.job.clock("probe"):
            before = feed.call(block, 0, block.module)
            given = feed if basis is None else feed.at([on_basis(feed.hidden[0], basis)])
            with in_place(block.module, moves, f"{block.name}."):
                after = given.call(block, 0, block.module)
            wanted = before if basis is None else on_basis(before, basis)
        return bool(self.job.ranks.agree(near(feed.real_tokens(after, 0), feed.real_tokens(wanted, 0))))

    def _try_outside(self, feed: Activations, windows: Windows) -> None:
        """Run what is outside the blocks both ways on a window."""
        work, blocks = self.work, list(self.work.blocks.values())
        some = windows.first(windows.ids.shape[1], 1)
        inputs = next(iter(some.batches(1, work.device)))
        positions = torch.arange(some.ids.shape[1])

        def ends(first: Tensor) -> tuple[Tensor, Tensor]:
            return work.record(some, 1).hidden[0], head(work.model, blocks, first, positions, **inputs)

        first = feed.hidden[0][:1].to(work.device)
        try:
            with self.apart():
                moves = self.outer(self.trial)
                hidden, out = ends(first)
                with in_place(work.model, moves):
                    changed, after = ends(on_basis(first, self.trial))
        except InputError as problem:
            self.found.left["hidden"] = str(problem)
            return
        if not self.job.ranks.agree(near(changed, on_basis(hidden, self.trial)) and near(after, out)):
            self.found.left["hidden"] = f"of what is outside the blocks: {CHANGED}"


def gathered(block: Block, width: int) -> tuple[int, int]:
    """Inputs of what reads the block's hidden states, taken as one where a module's matrices do, and bytes of what is kept of
    them: H^-1 of each, and rows."""
    reading = readers(block, width)
    inputs = len({site.name.rpartition(".")[0] for site in reading})
    return inputs, 4 * width * (inputs * width + sum(min(site.rows, ROWS) for site in reading))


def scaled(weight: Tensor, gram: Gram) -> Tensor | None:
    """Weights (out, in) in float32, times what makes them put out an energy of 1 a token; None if they put out none."""
    weight = weight.float()
    _, energy = gram.errors(weight, torch.zeros_like(weight))
    return weight * (gram.tokens / energy) ** 0.5 if energy > 0 else None


def on_basis(hidden: Tensor, basis: Tensor) -> Tensor:
    """Hidden states (..., width) with their channels on another basis."""
    return moved(hidden, [Move(basis, hidden.ndim - 1)])


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by no more than adding up in another order makes."""
    difference = (one.float() - other.float()).norm() / other.float().norm()
    return bool(difference <= SAME[one.dtype])
