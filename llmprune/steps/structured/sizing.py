"""What a smaller model keeps: amounts that the user names, or budgets, spread by what each part is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from transformers import PretrainedConfig

from llmprune.base.errors import InputError
from llmprune.base.notation import Amount
from llmprune.base.words import count
from llmprune.job.job import Job
from llmprune.job.options import PruneConfig
from llmprune.models.groups import neurons
from llmprune.models.heads import Heads
from llmprune.models.sites import Block, Site
from llmprune.models.skeleton import Skeleton
from llmprune.models.target import Target
from llmprune.steps.structured.allocate import Curve, Part, allocate
from llmprune.steps.structured.configs import (
    departs,
    departure,
    kept_layers,
    kept_neurons,
    smaller_config,
    uneven_config,
    ways_to_keep_heads,
)
from llmprune.steps.structured.cutting import check_fit
from llmprune.steps.structured.scouting import Scouted, Watched
from llmprune.steps.structured.sizes import Sizes

_WIDE, _ROUND, _ROUND_TINY = 1024, 64, 8  # neurons from which multiples of 64 stay; else of 8


class Sizing(Protocol):
    """Decides what stays.

    Attributes:
        trial: the layers and sizes that a preflight may reckon with.
        ways: sizes between which the error decides, that it would leave.
        drops: whether the loss without each layer is to be measured.
        probes: how many losses of a layer are to be measured.
    """

    trial: tuple[list[int], list[Sizes]]
    ways: Sequence[Sizes]
    drops: bool
    probes: int

    def watched(self, block: Block) -> Watched:
        """See `scouting.Ask`."""
        ...

    def consumers(self, block: Block) -> list[Site]:
        """The matrices of `block` that may lose inputs."""
        ...

    def decide(self, scouted: Scouted, leaving: Iterator[int]) -> Chosen:
        """What stays; `leaving` names layers, the one that is worth least first."""
        ...


@dataclass(frozen=True, slots=True)
class Chosen:
    """The layers that stay, their sizes, and how fast that was predicted to be, where a speed was asked for (plain data)."""

    layers: list[int]
    sizes: list[Sizes]
    speed: dict[str, Any] | None = None


class Builder:
    """Builds smaller models of `skeleton`, empty."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton, self.blocks = skeleton, skeleton.describe()

    def config(self, layers: list[int], sizes: Sequence[Sizes]) -> PretrainedConfig:
        """The configuration of the model of these layers and sizes.

        Raises:
            InputError: transformers do not load it.
        """
        uneven = len(set(sizes)) > 1
        whole = widths(self.blocks) if any(own.neurons for own in sizes) else 0
        smaller = smaller_config(
            self.skeleton.model.config,
            neurons=None if uneven or not sizes[0].neurons else (whole, sizes[0].neurons),
            heads=None if uneven else sizes[0].left(),
            layers=layers if len(layers) < len(self.blocks) else None,
        )
        return uneven_config(smaller, [(own.neurons, own.left()) for own in sizes], whole) if uneven else smaller

    def target(self, layers: list[int], sizes: Sequence[Sizes]) -> Target:
        """That model.

        Raises:
            InputError: transformers do not load it, or the blocks that they build have other sizes.
        """
        target = Target(self.skeleton, self.config(layers, sizes), layers)
        for layer, built, own in zip(layers, target.describe(), sizes, strict=True):
            check_fit(self.blocks[layer], built, own)
        return target


class Amounts:
    """As many heads, neurons and layers as the user says: a `Sizing`."""

    drops = False

    def __init__(self, builder: Builder, job: Job) -> None:
        config, note = job.config, job.progress.note
        self._builder, self._config = builder, config
        blocks = builder.blocks
        self._layers = len(blocks)
        if config.layers is not None:
            self._layers = kept_layers(Amount.parse("layers", config.layers), self._layers)
        self._width: tuple[int, int] | None = None
        if config.neurons is not None:
            self._width = self._neurons(Amount.parse("neurons", config.neurons), note)
        self._layout = Heads.of(builder.skeleton.model.config) if config.heads is not None else None
        self._kept: dict[bool, int] = {}
        if config.heads is not None and self._layout:
            self._kept = self._loadable(Amount.parse("heads", config.heads), self._layout, note)
        if config.per_layer:  # one way for all layers: the first, with keys and values
            self._kept = dict(list(self._kept.items())[:1])
        every = [self._sizes(whole) for whole in self._kept] or [self._sizes(False)]
        self.trial = (list(range(self._layers)), every[:1] * self._layers)
        builder.target(*self.trial)
        self.ways = every if len(every) > 1 else []
        self._each = every[0]
        self.probes = sum(amount is not None for amount in (config.heads, config.neurons)) if config.per_layer else 0

    def __str__(self) -> str:
        """In words, such as `keep 6 of 8 heads, 528 of 704 neurons`."""
        parts = []
        if self._layout:
            parts.append(f"{self._each.heads} of {count(self._layout.query, 'head')}")
        if self._width:
            parts.append(f"{self._width[1]} of {count(self._width[0], 'neuron')}")
        if self._layers < len(self._builder.blocks):
            parts.append(f"{self._layers} of {count(len(self._builder.blocks), 'layer')}")
        return "keep " + ", ".join(parts)

    def _neurons(self, amount: Amount, note: Callable[[str], None]) -> tuple[int, int]:
        """How many there are, and how many stay."""
        whole = widths(self._builder.blocks)
        step = multiple(self._config, whole)
        kept = kept_neurons(amount, whole, step)
        if departs(amount, whole, whole - kept):
            why = f"those that stay are a multiple of {step}, which --round-to can change"
            note(departure("neurons", amount, whole, whole - kept, [why]))
        return whole, kept

    def _sizes(self, whole: bool) -> Sizes:
        return Sizes(self._width[1] if self._width else None, self._kept.get(whole), self._layout, whole)

    def _loadable(self, amount: Amount, layout: Heads, note: Callable[[str], None]) -> dict[bool, int]:
        """How many heads stay, by way of removing them: the number nearest to what is asked for that transformers load."""
        ways, problem = ways_to_keep_heads(amount, layout), InputError("")
        for kept in dict.fromkeys(kept for kept, _ in ways):
            found = {whole: kept for own, whole in ways if own == kept}
            try:
                for whole in found:
                    each = Sizes(self._width[1] if self._width else None, kept, layout, whole)
                    self._builder.target(list(range(self._layers)), [each] * self._layers)
            except InputError as error:
                problem = problem if str(problem) else error
                continue
            reasons = [_together(layout)] if departs(amount, layout.query, layout.query - ways[0][0]) else []
            reasons += [f"{count(ways[0][0], 'head')} would not load ({problem})"] if str(problem) else []
            if reasons:
                note(departure("heads", amount, layout.query, layout.query - kept, reasons))
            return found
        raise problem

    def watched(self, block: Block) -> Watched:
        """Up to three times what is asked for, where layers may differ."""
        steps = self._each.steps(block) if self._config.per_layer else []
        return {
            groups[0].kind: [
                (group, max(3 * self._each.stay(group) - 2 * group.count, group.bundles), self._each.stay(group))
                for group in groups
            ]
            for groups in steps
        }

    def consumers(self, block: Block) -> list[Site]:
        return [group.consumer for step in self._each.steps(block) for group in step]

    def decide(self, scouted: Scouted, leaving: Iterator[int]) -> Chosen:
        gone = set(islice(leaving, len(self._builder.blocks) - self._layers))
        layers = [layer for layer in range(len(self._builder.blocks)) if layer not in gone]
        each = min(self.ways, key=lambda way: scouted.errors[way], default=self._each)
        sizes = [each] * len(layers)
        if self._config.per_layer:
            sizes = self._differing(each, [scouted.curves[layer] for layer in layers])
        return Chosen(layers, sizes)

    def _differing(self, each: Sizes, curves: Sequence[dict[str, Curve]]) -> list[Sizes]:
        """As many heads and neurons in all as if each layer had the sizes `each`, by what every layer would lose."""
        sizes = [each] * len(curves)
        if self._width:
            whole, kept = self._width
            step = multiple(self._config, whole)
            parts = [Part(curve["neurons"], whole % step or step, step) for curve in curves]
            gone = allocate(parts, len(parts) * (whole - kept))
            sizes = [replace(own, neurons=whole - less) for own, less in zip(sizes, gone, strict=True)]
        if self._layout and each.heads:
            step, heads_a_step = (1, self._layout.query // self._layout.value) if each.whole else (self._layout.value, 1)
            parts = [Part(curve["heads"], step, step) for curve in curves]
            gone = allocate(parts, len(parts) * (self._layout.query - each.heads) // heads_a_step)
            sizes = [
                replace(own, heads=self._layout.query - heads_a_step * less) for own, less in zip(sizes, gone, strict=True)
            ]
        return sizes


def _together(layout: Heads) -> str:
    """Why not any number of heads can go."""
    return (
        f"{layout.query // layout.value} heads share keys and values, in each of {count(layout.value, 'group')}; "
        "whole groups go, or as many heads of each"
    )


def widths(blocks: Sequence[Block]) -> int:
    """How many neurons each feed-forward part has.

    Raises:
        InputError: their numbers differ, or none is known.
    """
    counts = {group.count for block in blocks for group in neurons(block)}
    if len(counts) > 1:
        raise InputError(f"feed-forward parts of {', '.join(map(str, sorted(counts)))} neurons cannot be made smaller alike")
    return counts.pop()


def multiple(config: PruneConfig, whole: int) -> int:
    """Of which the number of neurons that stay is one."""
    return config.round_to or (_ROUND if whole >= _WIDE else _ROUND_TINY)
