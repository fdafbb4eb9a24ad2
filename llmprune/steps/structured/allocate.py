"""How much each layer loses: where removing costs the hidden states least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from llmprune.base.precision import full_float32
from llmprune.steps.structured.scores.base import Coupled
from llmprune.steps.structured.scores.second_order import rounds


@dataclass(frozen=True, slots=True)
class Curve:
    """What is lost as parts of a layer go: `losses[i]` with `removed[i]` parts gone."""

    removed: Sequence[int]
    losses: Sequence[float]

    def at(self, count: int) -> float:
        """Between the points that were measured, on a straight line."""
        for i in range(1, len(self.removed)):
            if count <= self.removed[i]:
                share = (count - self.removed[i - 1]) / (self.removed[i] - self.removed[i - 1])
                return self.losses[i - 1] + share * (self.losses[i] - self.losses[i - 1])
        return self.losses[-1]

    def scaled(self, factor: float) -> Curve:
        return Curve(self.removed, [loss * factor for loss in self.losses])


@dataclass(frozen=True, slots=True)
class Part:
    """What a layer can lose of one kind: `first` at first, then `step` at a time; each has `price` parameters."""

    curve: Curve
    first: int
    step: int
    price: int = 1

    def after(self, gone: int) -> int:
        """How many will be gone one step later."""
        return gone + self.step if gone else self.first

    def counts(self) -> Iterator[int]:
        """All that can go."""
        gone = 0
        while gone <= self.curve.removed[-1]:
            yield gone
            gone = self.after(gone)


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer has, by kind, and what the hidden states lose without it."""

    parameters: int
    loss: float
    parts: Mapping[str, Part]


@dataclass(frozen=True, slots=True)
class Shape:
    """What goes: whole layers, of each other layer so many parts by kind; and the sum of what is lost."""

    dropped: Sequence[int]
    gone: Sequence[Mapping[str, int]]
    loss: float


@full_float32()
def measure(coupled: Coupled, keep: int) -> Curve:
    """By second order, down to `keep` parts."""
    removed, losses = [0], [0.0]
    for going, more in rounds(coupled, keep):
        removed.append(removed[-1] + len(going))
        losses.append(losses[-1] + more)
    return Curve(removed, losses)


def mean(curves: Sequence[Curve]) -> Curve:
    """Of the experts of a layer, which all lose as many parts."""
    return Curve(curves[0].removed, [sum(each) / len(curves) for each in zip(*(one.losses for one in curves), strict=True)])


def in_nats(curves: Sequence[Curve], gone: int, nats: Sequence[float]) -> list[Curve]:
    """Each layer's curve, scaled by what `gone` parts of all layers lost, one layer at a time.

    The scale is the geometric mean of what the layer's own measure says and of what all say together: a single measure is
    noisy. One that is little or less than nothing, for the error that was left, counts as a tenth of what that error costs
    on average.
    """
    errors = [curve.at(gone) for curve in curves]
    typical = sum(nats) / sum(errors) if sum(nats) > 0 and sum(errors) > 0 else 1.0
    own = [max(lost / error, typical / 10) if error > 0 else typical for lost, error in zip(nats, errors, strict=True)]
    return [curve.scaled((scale * typical) ** 0.5) for curve, scale in zip(curves, own, strict=True)]


def allocate(parts: Sequence[Part], save: int) -> list[int]:
    """How many of each go so that at least `save` parameters do, if so many can: each time where a parameter costs least."""
    gone = [0] * len(parts)

    def cost(one: int) -> float:
        part, less = parts[one], parts[one].after(gone[one])
        return (part.curve.at(less) - part.curve.at(gone[one])) / ((less - gone[one]) * part.price)

    while sum(count * part.price for count, part in zip(gone, parts, strict=True)) < save:
        able = [one for one, part in enumerate(parts) if part.after(gone[one]) <= part.curve.removed[-1]]
        if not able:
            break
        cheapest = min(able, key=cost)
        gone[cheapest] = parts[cheapest].after(gone[cheapest])
    return gone


def shapes_that_save(
    layers: Sequence[Layer], order: Sequence[int], save: int, kinds: Sequence[str], allowed: Mapping[str, Sequence[int]] | None
) -> Iterator[Shape]:
    """Ways to save at least `save` parameters by dropping the first layers of `order` and parts of these `kinds` of the others.

    Args:
        allowed: how many parts may go, by kind, where all layers are to lose as many; None: each layer has its own number.
    """
    for count in range(min(len(order), len(layers) - 1) + 1):
        dropped = order[:count]
        stay = [layer for number, layer in enumerate(layers) if number not in dropped]
        rest = save - sum(layers[number].parameters for number in dropped)
        lost = sum(layers[number].loss for number in dropped)
        for gone in _equal(stay, rest, kinds, allowed) if allowed is not None else _own(stay, rest, kinds):
            parts = sum(layer.parts[kind].curve.at(one[kind]) for layer, one in zip(stay, gone, strict=True) for kind in kinds)
            yield Shape(dropped, gone, lost + parts)


def _own(layers: Sequence[Layer], save: int, kinds: Sequence[str]) -> Iterator[list[dict[str, int]]]:
    parts, width = [layer.parts[kind] for layer in layers for kind in kinds], len(kinds)
    every = allocate(parts, save)
    if sum(count * part.price for count, part in zip(every, parts, strict=True)) >= save:
        yield [dict(zip(kinds, every[i * width : (i + 1) * width], strict=True)) for i in range(len(layers))]


def _equal(
    layers: Sequence[Layer], save: int, kinds: Sequence[str], allowed: Mapping[str, Sequence[int]]
) -> Iterator[list[dict[str, int]]]:
    """For every choice of the other kinds, the fewest of the last that suffice."""
    prices = {kind: sum(layer.parts[kind].price for layer in layers) for kind in kinds}
    *others, last = kinds
    for counts in product(*(allowed[kind] for kind in others)):
        rest = save - sum(prices[kind] * count for kind, count in zip(others, counts, strict=True))
        if enough := [count for count in allowed[last] if prices[last] * count >= rest]:
            yield [dict(zip(kinds, (*counts, min(enough)), strict=True)) for _ in layers]
