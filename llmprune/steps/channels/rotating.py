"""Rotations of hidden channels, or else of channels of values, after which a mask costs less."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.models.groups import heads
from llmprune.models.heads import Heads
from llmprune.models.sites import Block, Site
from llmprune.numerics.grouping import inverse_of
from llmprune.numerics.rotation import STEPS, Read, Rotation, Written, find_rotation, operations
from llmprune.numerics.stats import Gram
from llmprune.steps.channels.folding import fold, fold_last, head_name, untied
from llmprune.steps.channels.looking import CHANGED, NO_ATTENTION, ROWS, Looking, gathered, scaled
from llmprune.steps.channels.moves import Moves, in_place, joined
from llmprune.steps.channels.places import of_hidden, of_outside, of_values, readers, writers
from llmprune.stream.activations import Activations


@dataclass(slots=True)
class Rotating(Looking):
    """Finds rotations. They gather what matters in few weights of each group."""

    _folds: list[Moves] = field(default_factory=list)  # block by block
    _reading: list[Read] = field(default_factory=list)
    _writing: list[Written] = field(default_factory=list)

    @classmethod
    def burden(cls, blocks: Sequence[Block], width: int) -> tuple[int, float]:
        inputs, kept = (sum(own) for own in zip(*(gathered(block, width) for block in blocks), strict=True))
        writing = [site.columns for block in blocks for site in writers(block, width)]
        kept += 4 * width * sum(min(columns, ROWS) for columns in writing)
        return kept, operations(width, inputs, len(writing))

    def drawn_basis(self) -> Tensor:
        return torch.linalg.qr(torch.randn(self.width, self.width, generator=self.random))[0][None]

    def apart(self) -> AbstractContextManager[Any]:
        return untied(self.work.model)

    def outer(self, basis: Tensor) -> Moves:
        model = self.work.model
        folded = fold_last(model, self.outside, self.trial[0])
        others = [name for name in self.outside if name not in folded]
        return joined([folded, of_outside(model, [*others, head_name(model)], self.width, basis)])

    def visit(self, block: Block, feed: Activations) -> None:
        """Heads' values are rotated only where hidden channels are not: on top of those it gained nothing."""
        folded = self._fold(block, feed)
        if "hidden" in self.found.left:
            self._values(block, feed)
            return
        if not self.same(block, feed, joined([folded, of_hidden(block, self.width, self.trial)]), self.trial):
            self.found.left["hidden"] = f"of {block.name}: {CHANGED}"
            return
        self._folds.append(folded)
        with in_place(block.module, folded, f"{block.name}."):
            self._collect(block, feed)

    def finish(self) -> None:
        if not self._reading and not self._writing:
            return
        rotation = self._find(self._reading, self._writing)
        inside = [of_hidden(block, self.width, rotation.matrix) for block in self.describe()]
        with self.work.outside(), self.apart() as copies:
            outside = self.outer(rotation.matrix)
        self.found.copies = copies
        self.found.add("hidden", joined([*self._folds, *inside, outside]), [rotation])

    def _fold(self, block: Block, feed: Activations) -> Moves:
        """The block's norms without weights; nothing, where its hidden channels stay."""
        if "hidden" in self.found.left:
            return {}
        try:
            return fold(block, self.trial[0], lambda: feed.call(block, 0, block.module))
        except InputError as problem:
            self.found.left["hidden"] = str(problem)
            return {}

    def _collect(self, block: Block, feed: Activations) -> None:
        """What the hidden channels are decided by: rows of what reads them, columns of what writes them."""
        reading, writing = ({site.name for site in of(block, self.width)} for of in (readers, writers))

        def take(stage: Sequence[Site], gram: Gram) -> None:
            with self.job.clock("solve"):
                inverse = inverse_of(gram.mean())
                rows = [self.rows(site, gram) for site in stage if site.name in reading]
                if known := [own for own in rows if own is not None]:
                    self._reading.append(Read.of(torch.cat(known), inverse))
                for site in (site for site in stage if site.name in writing):
                    if (weight := scaled(site.weight, gram)) is not None:
                        self._writing.append(Written.of(weight, inverse, self.mask.size).some(ROWS, self.random))

        self.each_stage(block, feed, take)

    def _values(self, block: Block, feed: Activations) -> None:
        """Rotate the channels of each head's values, if that leaves the block's outputs alone."""
        layout = Heads.of(self.work.model.config)
        try:
            group = heads(block, layout, whole=True)
        except InputError:
            self.found.left[f"values of {block.name}"] = NO_ATTENTION
            return
        values, out = group.producers[2], group.consumer
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def take(stage: Sequence[Site], gram: Gram) -> None:
            with self.job.clock("solve"):
                for site in (site for site in stage if site.name in (values.name, out.name)):
                    weight = self.rows(site, gram) if site.name == out.name else scaled(site.weight, gram)
                    if weight is not None:
                        seen[site.name] = weight, inverse_of(gram.mean())

        self.each_stage(block, feed, take)
        if len(seen) < 2 or layout.width % self.mask.size:
            return
        shared = layout.query // layout.value
        every = Read.of(*seen[out.name], layout.query)
        reading = [Read(every.weight[own::shared], every.inverse[own::shared]) for own in range(shared)]
        writing = Written.of(*seen[values.name], self.mask.size, layout.value)
        rotation = self._find(reading, [writing])
        moves = of_values(block, group, layout, rotation.matrix)
        if self.same(block, feed, moves):
            self.found.add("values", moves, [rotation])
        else:
            self.found.left[f"values of {block.name}"] = CHANGED

    def _find(self, reading: Sequence[Read], writing: Sequence[Written]) -> Rotation:
        """A rotation of channels, the same in all processes."""
        with self.job.clock("solve"):
            rotation = find_rotation(reading, writing, self.mask, self.random, self._tell)
        matrix = rotation.matrix.cpu()
        self.job.ranks.of(0, matrix)
        return replace(rotation, matrix=matrix)

    def _tell(self, step: int) -> None:
        self.job.progress.solving(f"rotation, step {step + 1} of {STEPS}")
