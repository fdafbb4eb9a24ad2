"""Rotations of hidden channels, or else of channels of values, after which a mask costs less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.models.groups import heads
from llmprune.models.heads import Heads
from llmprune.models.sites import Block, Site
from llmprune.numerics.rotation import Read, Rotation, Written, find_rotation, inverse_of
from llmprune.numerics.stats import Gram
from llmprune.steps.channels.folding import fold, fold_last, head_name, untied
from llmprune.steps.channels.looking import CHANGED, NO_ATTENTION, ROWS, Looking
from llmprune.steps.channels.moves import Moves, in_place, joined
from llmprune.steps.channels.places import of_hidden, of_outside, of_values, readers, writers
from llmprune.stream.activations import Activations


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a site: H^-1 (in, in) of its inputs, and a factor of its weights, with which it puts out an
    energy of 1."""

    inverse: Tensor
    scale: float


@dataclass(slots=True)
class Rotating(Looking):
    """Finds rotations. They gather what matters in few weights of each group."""

    _folds: list[Moves] = field(default_factory=list)  # block by block
    _reading: list[Read] = field(default_factory=list)
    _writing: list[Written] = field(default_factory=list)

    def drawn_basis(self) -> Tensor:
        return torch.linalg.qr(torch.randn(self.width, self.width, generator=self.random))[0][None]

    def apart(self) -> AbstractContextManager[Any]:
        return untied(self.work.model)

    def outer(self, basis: Tensor) -> Moves:
        model = self.work.model
        names = [name for name in self.outside if name != head_name(model)]
        norm = fold_last(model, names, self.width)
        tables = [name for name in names if name not in norm]
        return joined([norm, of_outside(model, [*tables, head_name(model)], self.width, basis)])

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
            self._collect(block, self._look_at(block, feed))

    def finish(self) -> None:
        if not self._reading:
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
            return fold(block, self.width, lambda: feed.call(block, 0, block.module))
        except InputError as problem:
            self.found.left["hidden"] = str(problem)
            return {}

    def _look_at(self, block: Block, feed: Activations) -> dict[str, Seen]:
        found: dict[str, Seen] = {}

        def take(stage: Sequence[Site], gram: Gram) -> None:
            with self.job.clock("solve"):
                inverse = inverse_of(gram.mean())
                for site in stage:
                    weight = site.weight.float()
                    _, energy = gram.errors(weight, torch.zeros_like(weight))
                    if energy > 0:
                        found[site.name] = Seen(inverse, (gram.tokens / energy) ** 0.5)

        self.each_stage(block, feed, take)
        return found

    def _values(self, block: Block, feed: Activations) -> None:
        """Rotate the channels of each head's values, if that leaves the block's outputs alone."""
        layout = Heads.of(self.work.model.config)
        try:
            group = heads(block, layout, whole=True)
        except InputError:
            self.found.left[f"values of {block.name}"] = NO_ATTENTION
            return
        values, out = group.producers[2], group.consumer
        seen = self._look_at(block, feed)
        if not {values.name, out.name} <= seen.keys() or layout.width % self.mask.size:
            return
        shared = layout.query // layout.value
        every = Read.of(self._some(out, seen), seen[out.name].inverse, layout.query)
        reading = [Read(every.weight[own::shared], every.inverse[own::shared]) for own in range(shared)]
        writing = Written.of(_weight(values, seen), seen[values.name].inverse, self.mask.size, layout.value)
        rotation = self._find(reading, [writing])
        moves = of_values(block, group, layout, rotation.matrix)
        if self.same(block, feed, moves):
            self.found.add("values", moves, [rotation])
        else:
            self.found.left[f"values of {block.name}"] = CHANGED

    def _collect(self, block: Block, seen: Mapping[str, Seen]) -> None:
        """What the hidden channels are decided by: rows of what reads them, columns of what writes them."""
        stages: dict[int, list[Site]] = {}
        for site in readers(block, self.width):
            if site.name in seen:
                stages.setdefault(id(seen[site.name].inverse), []).append(site)
        for stage in stages.values():
            rows = torch.cat([self._some(site, seen) for site in stage])
            self._reading.append(Read.of(rows, seen[stage[0].name].inverse))
        for site in writers(block, self.width):
            if site.name in seen:
                whole = Written.of(_weight(site, seen), seen[site.name].inverse, self.mask.size)
                self._writing.append(whole.some(ROWS, self.random))

    def _some(self, site: Site, seen: Mapping[str, Seen]) -> Tensor:
        """Some rows of a site's weights, drawn at random."""
        drawn = torch.randperm(site.rows, generator=self.random)[:ROWS].to(site.weight.device)
        return site.weight[drawn].float() * seen[site.name].scale

    def _find(self, reading: Sequence[Read], writing: Sequence[Written]) -> Rotation:
        """A rotation of channels, the same in all processes."""
        with self.job.clock("solve"):
            rotation = find_rotation(reading, writing, self.mask, self.random)
        matrix = rotation.matrix.cpu()
        self.job.ranks.of(0, matrix)
        return replace(rotation, matrix=matrix)


def _weight(site: Site, seen: Mapping[str, Seen]) -> Tensor:
    return site.weight.float() * seen[site.name].scale
