"""Budgets, spread over heads, neurons and layers where each costs the hidden states least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llmprune.base.errors import InputError
from llmprune.job.job import Job
from llmprune.models.sites import Block, Site
from llmprune.steps.structured.kinds import Kind, Kinds
from llmprune.steps.structured.limits import COUNTED, Counted, Limit
from llmprune.steps.structured.scouting import Scouted
from llmprune.steps.structured.sizes import Sizes
from llmprune.steps.structured.sizing import Builder, Chosen, Watched
from llmprune.steps.structured.speed import Speed
from llmprune.steps.structured.spread import Choice, Layer, Program, Shape

_TRIED = 16  # so many shapes are built, the best first, before the budget is given up
_IN_VAIN = 1e-3  # nats that removing the whole model for nothing would cost: less than any part of it is worth
_CLOSE = 0.01  # by which a first choice may be measured to be short of what was asked for without another choice


class Budget:
    """What the user allows to stay, by the loss that was measured as each layer lost some or went: a `Sizing`.

    Raises:
        InputError: fewer must stay than that, or nothing has to go.
    """

    drops = True

    def __init__(self, builder: Builder, job: Job) -> None:
        self._builder, self._job = builder, job
        every = list(range(len(builder.blocks)))
        self.trial = (every, [Sizes(None, None, None, False)] * len(every))
        self.ways: Sequence[Sizes] = ()
        self._kinds = Kinds(builder, job.config, job.progress.note)
        self.probes = len(self._kinds.found) + 1
        given = job.config.budgets
        self._counted = [Counted(builder, self._kinds, option, given[option]) for option in COUNTED if option in given]
        self._speed = Speed(builder, self._kinds, job) if job.config.target_speedup else None

    def __str__(self) -> str:
        return "keep " + ", ".join(map(str, [*self._counted, *([self._speed] if self._speed else [])]))

    @cached_property
    def _limits(self) -> list[Limit]:
        """What was asked for; a speed is measured when this is first wanted."""
        limits = [counted.limit for counted in self._counted]
        if self._speed:
            limits.append(self._speed.limit())
            limits[-1].check(self._kinds)
        return limits

    def watched(self, block: Block) -> Watched:
        return {
            name: [
                (group, kind.count - kind.most, kind.count - self._probed(kind)) for group in self._kinds.groups(name, block)
            ]
            for name, kind in self._kinds.found.items()
        }

    def _probed(self, kind: Kind) -> int:
        """How many parts of one layer go where the loss is measured: nearest to the share that is to be saved in all."""
        share = kind.count * max(limit.share() for limit in self._limits)
        return min(kind.counts()[1:], key=lambda gone: abs(gone - share))

    def consumers(self, block: Block) -> list[Site]:
        named = {group.consumer.name: group.consumer for parts in self.watched(block).values() for group, *_ in parts}
        return list(named.values())

    def decide(self, scouted: Scouted, leaving: Iterator[int]) -> Chosen:
        found = self._best(scouted, self._limits)
        if self._speed is None:
            return self._say(*found)
        shape, layers, sizes = found
        predicted, factor = self._speed.predicted(shape.gone), 1.0
        measured = self._job.ranks.agree(self._speed.tried(layers, sizes) if self._job.ranks.first else None)
        if measured is not None:
            factor = measured / predicted
            told = f"the first choice was predicted to be {predicted:.2f}x as fast and measured, with other weights, to be"
            self._job.progress.note(f"{told} {measured:.2f}x")
            if predicted * factor < (1 - _CLOSE) * self._speed.asked:
                found = self._again(scouted, factor) or found
        return self._say(*found, factor)

    def finish(self, speed: dict[str, Any], dense: Path, smaller: Path) -> dict[str, Any]:
        """See `Speed.finish`."""
        assert self._speed is not None
        return self._speed.finish(speed, dense, smaller)

    def _again(self, scouted: Scouted, factor: float) -> tuple[Shape, list[int], list[Sizes]] | None:
        """What is best where models are `factor` times as fast as predicted; None, and a word, where nothing is fast enough."""
        assert self._speed is not None
        try:
            return self._best(scouted, [*self._limits[:-1], self._speed.limit(factor)])
        except InputError:
            self._job.progress.note("nothing that loads is predicted to be faster by that much: the first choice stays")
            return None

    def _say(self, shape: Shape, layers: list[int], sizes: list[Sizes], factor: float = 1.0) -> Chosen:
        """The choice, and in words what it comes to."""
        target = self._builder.target(layers, sizes)
        parts, speed = [counted.told(target) for counted in self._counted], None
        if self._speed:
            speed = self._speed.record(factor * self._speed.predicted(shape.gone), factor)
            parts.append(f"predicted {speed['predicted']:.2f}x the speed in {self._speed.use}")
        self._job.progress.note(f"{self._kinds.told(layers, sizes)}: {', '.join(parts)}")
        return Chosen(layers, sizes, speed)

    def _best(self, scouted: Scouted, limits: Sequence[Limit]) -> tuple[Shape, list[int], list[Sizes]]:
        """What loses least within the limits, and loads.

        Raises:
            InputError: there is nothing.
        """
        layers = [self._layer(number, scouted, limits) for number in range(len(self._builder.blocks))]
        most, equal = [limit.inside() for limit in limits], not self._job.config.per_layer
        programs = [Program(layers, names, most, equal=equal) for names in self._kinds.together]
        problem = InputError(f"{self} is not possible in steps that load: ask for another number")
        found = [program.best() for program in programs]
        for _ in range(_TRIED):
            able = [number for number, shape in enumerate(found) if shape is not None]
            if not able:
                break
            number = min(able, key=lambda number: found[number].loss)  # type: ignore[union-attr]
            shape = found[number]
            assert shape is not None
            stay = [layer for layer in range(len(layers)) if layer not in shape.dropped]
            sizes = self._kinds.sizes(shape.gone)
            try:
                target = self._builder.target(stay, sizes)
                if all(counted.kept(target) for counted in self._counted):
                    return shape, stay, sizes
            except InputError as error:
                problem = error
            programs[number].forbid(shape)
            found[number] = programs[number].best()
        raise problem

    def _layer(self, number: int, scouted: Scouted, limits: Sequence[Limit]) -> Layer:
        def lost(loss: float, saves: Sequence[float]) -> float:
            """And what nobody asked for is not removed."""
            return loss + _IN_VAIN * sum(more / limit.whole for more, limit in zip(saves, limits, strict=True))

        curves, parts, costs = scouted.curves[number], {}, [limit.layers[number] for limit in limits]
        for name, kind in self._kinds.found.items():
            counts = kind.counts() if self._job.config.per_layer else kind.loads
            choices = [(gone, [limit.saved(name, number, gone) if gone else 0.0 for limit in limits]) for gone in counts]
            parts[name] = [Choice(gone, lost(curves[name].at(gone), saves), saves) for gone, saves in choices]
        return Layer(lost(scouted.drops[number], costs), costs, parts)
