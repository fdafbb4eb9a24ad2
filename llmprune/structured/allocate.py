"""Sizes that differ by layer: where removing costs the layer's own output least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.structured.scores.base import Coupled
from llmprune.structured.scores.second_order import rounds


@dataclass(frozen=True, slots=True)
class Curve:
    """What hidden states lose, relative to their square, as parts of a layer go: `losses[i]` with `removed[i]` parts gone."""

    removed: Sequence[int]
    losses: Sequence[float]

    def at(self, count: int) -> float:
        """Between the points that were measured, on a straight line."""
        for i in range(1, len(self.removed)):
            if count <= self.removed[i]:
                share = (count - self.removed[i - 1]) / (self.removed[i] - self.removed[i - 1])
                return self.losses[i - 1] + share * (self.losses[i] - self.losses[i - 1])
        return self.losses[-1]


def measure(coupled: Coupled, keep: int, power: float) -> Curve:
    """By second order, down to `keep` parts. `power` is the mean square of a token's hidden state, which the output is added
    to: relative to the output itself, layers that add little would seem as sensitive as those that add much.
    """
    removed, losses = [0], [0.0]
    for going, more in rounds(coupled, keep):
        removed.append(removed[-1] + len(going))
        losses.append(losses[-1] + more / power)
    return Curve(removed, losses)


def mean(curves: Sequence[Curve]) -> Curve:
    """Of the experts of a layer, which all lose as many parts."""
    return Curve(curves[0].removed, [sum(each) / len(curves) for each in zip(*(one.losses for one in curves), strict=True)])


def allocate(curves: Sequence[Curve], total: int, step: int, first: int) -> list[int]:
    """How many parts each layer loses, at most `total` in all: each time where a part costs least. A layer loses `first` parts,
    then `step` at a time.
    """
    gone = [0] * len(curves)

    def more(layer: int) -> int:
        return step if gone[layer] else first

    def cost(layer: int) -> float:
        curve = curves[layer]
        return (curve.at(gone[layer] + more(layer)) - curve.at(gone[layer])) / more(layer)

    while open_ := [
        layer
        for layer, curve in enumerate(curves)
        if gone[layer] + more(layer) <= curve.removed[-1] and sum(gone) + more(layer) <= total
    ]:
        layer = min(open_, key=cost)
        gone[layer] += more(layer)
    return gone
