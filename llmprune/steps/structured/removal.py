"""Removes heads and neurons from one block after the other, and fits what read them again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.base.clock import Clock
from llmprune.base.errors import InputError
from llmprune.base.precision import full_float32
from llmprune.base.processes import Ranks
from llmprune.job.record import Removal, relative
from llmprune.models.groups import Group, bias_name
from llmprune.models.sites import Block, Stage
from llmprune.models.target import Target
from llmprune.numerics.linalg import kept_least_squares
from llmprune.numerics.stats import SAMPLE_TOKENS, CrossGram, Gram, InputSample
from llmprune.steps.structured.cutting import bias_of, cut_block, members
from llmprune.steps.structured.scores import SCORES
from llmprune.steps.structured.scores.base import Coupled
from llmprune.steps.structured.sizes import Sizes
from llmprune.steps.weights.observing import Observed, blend_experts
from llmprune.stream.activations import Activations, PairedDense
from llmprune.stream.engine import Source


@dataclass(frozen=True, slots=True)
class Removed:
    """What choosing found: the parts that stay, the consumer's weights (out, in), zero where it reads none of them, and what
    its bias gains, if it has one."""

    kept: Tensor
    weight: Tensor
    shift: Tensor | None


@dataclass(slots=True)
class SmallerBlocks:
    """A `Source` of the smaller model's blocks, made from those of `source` when they are asked for.

    Attributes:
        sizes: what stays in each block.
        feed: the calibration tokens as the smaller model sees them; moved on by who asks for blocks.
        dense: the same as the dense model sees them, where what is fitted aims at its outputs; moved on here.
        tell: hears of every removal.
        removals: what was removed, in order.
        slopes: for a score that has `backward`, by site name.
        finished: what came of the blocks that an earlier run has made, for `restore` to fill.
    """

    source: Source
    target: Target
    sizes: Sequence[Sizes]
    score: str
    refit: bool
    feed: Activations
    dense: Activations | None
    tokens: int
    clock: Clock
    ranks: Ranks
    tell: Callable[[Removal], None]
    removals: list[Removal]
    slopes: Mapping[str, Tensor]
    finished: Sequence[Mapping[str, Any]]
    restore: Callable[[Block], None]

    def blocks(self) -> Iterator[Block]:
        for block in self.source.blocks():
            yield self._repeat(block) if block.index < len(self.finished) else self._shrink(block)
            self.target.release(block.index)

    def report(self, block: Block) -> dict[str, Any]:
        """What came of a block, for `finished`."""
        return {"removals": [asdict(one) for one in self.removals if one.block == block.index]}

    def _repeat(self, block: Block) -> Block:
        """The smaller block as an earlier run has made it."""
        if self.dense is not None:
            with self.clock("forward"):
                self.dense.advance(block)
        smaller = self.target.empty(block.index)
        self.restore(smaller)
        self.removals += [Removal(**one) for one in self.finished[block.index]["removals"]]
        return smaller

    def _shrink(self, block: Block) -> Block:
        reference = block.copy() if self.dense is not None else None
        rows: dict[str, Tensor] = {}  # of each site that loses rows, or columns, those that stay
        columns: dict[str, Tensor] = {}
        steps = self.sizes[block.index].steps(block)
        asks = getattr(SCORES.get(self.score), "gains", False)
        gains = self.feed.gains(block, [site for step in steps for one in step for site in one.producers]) if asks else {}
        for groups in steps:
            paired = None
            if self.dense is not None and reference is not None:
                paired = PairedDense(self.dense, reference, advance=groups is steps[-1])
            with self.clock("forward"):
                observed = self.feed.collect(block, [[group.consumer] for group in groups], self._observe, paired)
            with self.clock("statistics"):
                for seen in observed:
                    seen.add_up(self.ranks)
                blend_experts([[group.consumer] for group in groups], observed)
            for group, seen in zip(groups, observed, strict=True):
                kept = self._remove(block, group, seen, gains)
                columns[group.consumer.name] = members(kept, group.count, group.consumer.columns)
                for site in group.producers:
                    rows[site.name] = members(kept, group.count, site.rows)
        if not steps and self.dense is not None and reference is not None:
            self.dense.advance(reference)
        return cut_block(block, rows, columns, self.target)

    def _observe(self, stage: Stage, device: torch.device) -> Observed:
        return observe(stage, device, self.tokens, self.clock, corrected=self.dense is not None)

    def _remove(self, block: Block, group: Group, seen: Observed, gains: Mapping[str, Tensor]) -> Tensor:
        """Choose what stays and write the fitted consumer; returns what stays."""
        start, site = time.perf_counter(), group.consumer
        with self.clock("solve"):
            dense, stay = site.weight.to(torch.float32, copy=True), self.sizes[block.index].stay(group)
            known = coupled(group, seen, self.slopes, gains)
            found = choose(group, seen, known, stay, self.score, refit=self.refit)
            for tensor in (found.kept, found.weight, *([] if found.shift is None else [found.shift])):
                self.ranks.of(0, tensor)  # all processes must keep the same
            site.write(found.weight)
            if found.shift is not None:
                bias = bias_of(block, site)
                bias.copy_((bias.float() + found.shift).to(block.storage[f"{block.name}.{bias_name(site, block)}"]))
            lost, whole = self.ranks.totals(*seen.sample.errors(dense, site.weight.float(), found.shift))
        error, seconds = relative(lost, whole), time.perf_counter() - start
        counts = group.count * group.each, stay * group.each
        self.removals.append(Removal(block.index, group.kind, site.name, *counts, error, seconds))
        self.tell(self.removals[-1])
        return found.kept


def observe(stage: Stage, device: torch.device, tokens: int, clock: Clock, *, corrected: bool) -> Observed:
    """What to keep of a consumer's inputs."""
    columns = stage[0].columns
    cross = CrossGram(columns, device) if corrected and not stage[0].pool else None
    return Observed(Gram(columns, device), InputSample(tokens // SAMPLE_TOKENS), cross, clock)


@full_float32()
def choose(group: Group, seen: Observed, known: Coupled, stay: int, score: str, *, refit: bool) -> Removed:
    """Which `stay` parts of a group stay, and the consumer's weights for them: fitted by least squares to what it put out.

    Where the consumer has a bias, it takes up what the removed inputs put out on average, as in FLAP (An et al., 2024).

    Raises:
        InputError: the inputs are not finite, or say nothing.
    """
    site, statistic = group.consumer, seen.statistic
    assert isinstance(statistic, Gram)
    if not statistic.finite():
        raise InputError(f"the inputs of {site.name} hold NaN or infinity; try --dtype float32")
    dense = site.weight.float()
    try:
        kept = SCORES.get(score).select(known, stay)
        columns = members(kept, group.count, site.columns)
        weight = torch.zeros_like(dense)
        weight[:, columns] = dense[:, columns]
        if not refit:
            return Removed(kept, weight, None)
        target, gram, shift = seen.target(dense), statistic.mean(), None
        biased = not site.part and getattr(site.module, "bias", None) is not None
        means = statistic.means()
        if biased:
            gram = gram - torch.outer(means, means)
        weight[:, columns] = kept_least_squares(gram, target, dense, columns)
        if biased:
            shift = (target - weight) @ means
        return Removed(kept, weight, shift)
    except InputError as problem:
        raise InputError(f"{site.name}: {problem}; another calibration text may help") from None


def coupled(group: Group, seen: Observed, slopes: Mapping[str, Tensor], gains: Mapping[str, Tensor]) -> Coupled:
    """What scores know of a group."""
    site, statistic = group.consumer, seen.statistic
    assert isinstance(statistic, Gram)
    producers = [one.weight.float() for one in group.producers]
    gain, slope = gains.get(group.producers[0].name), slopes.get(site.name)
    return Coupled(site.weight.float(), producers, statistic, seen.sample.inputs(), group.count, group.bundles, gain, slope)


def removal_error(block: Block, sizes: Sizes, feed: Activations, tokens: int, clock: Clock, ranks: Ranks) -> float:
    """The relative error that removing from a block's first step by second order would leave; nothing is changed."""
    (group,) = sizes.steps(block)[0]
    with clock("forward"):
        (seen,) = feed.collect(
            block, [[group.consumer]], lambda stage, device: observe(stage, device, tokens, clock, corrected=False)
        )
    seen.add_up(ranks)
    found = choose(group, seen, coupled(group, seen, {}, {}), sizes.stay(group), "second_order", refit=True)
    lost, whole = ranks.totals(*seen.sample.errors(group.consumer.weight.float(), found.weight, found.shift))
    return relative(lost, whole) or 0.0


@contextmanager
def without(block: Block, groups: Sequence[Group], found: Sequence[Removed]) -> Iterator[None]:
    """The block as if what was found had been removed."""
    sites = [group.consumer for group in groups]
    weights = [site.weight.clone() for site in sites]
    biases = [(bias_of(block, site), one.shift) for site, one in zip(sites, found, strict=True) if one.shift is not None]
    kept = [bias.clone() for bias, _ in biases]
    try:
        for site, one in zip(sites, found, strict=True):
            site.weight.copy_(one.weight)
        for bias, shift in biases:
            bias += shift
        yield
    finally:
        for site, weight in zip(sites, weights, strict=True):
            site.weight.copy_(weight)
        for (bias, _), value in zip(biases, kept, strict=True):
            bias.copy_(value)
