"""What removing from each layer loses, and how one number of heads or neurons is spread over layers by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from llmprune.base.precision import full_float32
from llmprune.steps.structured.scores.base import Coupled
from llmprune.steps.structured.scores.second_order import rounds

_NOTHING = 1e-5  # nats a token: below it KL divergences are rounding


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
    """What a layer can lose of one kind: `first` at first, then `step` at a time."""

    curve: Curve
    first: int
    step: int

    def after(self, gone: int) -> int:
        """How many will be gone one step later."""
        return gone + self.step if gone else self.first


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
    """Each layer's curve, scaled by what the model lost with `gone` parts of this layer alone removed.

    What loses nothing that can be measured says nothing of what more would lose: it counts a tenth of the layers' median.
    """
    measured = [(lost, curve.at(gone)) for lost, curve in zip(nats, curves, strict=True)]
    own = [lost / error if lost > _NOTHING and error > 0 else None for lost, error in measured]
    typical = median([scale for scale in own if scale is not None] or [1.0])
    return [curve.scaled(typical / 10 if scale is None else scale) for curve, scale in zip(curves, own, strict=True)]


def allocate(parts: Sequence[Part], save: int) -> list[int]:
    """How many of each go so that at least `save` in all do, if so many can: each time where one more costs least."""
    gone = [0] * len(parts)

    def cost(one: int) -> float:
        part, less = parts[one], parts[one].after(gone[one])
        return (part.curve.at(less) - part.curve.at(gone[one])) / (less - gone[one])

    while sum(gone) < save:
        able = [one for one, part in enumerate(parts) if part.after(gone[one]) <= part.curve.removed[-1]]
        if not able:
            break
        cheapest = min(able, key=cost)
        gone[cheapest] = parts[cheapest].after(gone[cheapest])
    return gone
