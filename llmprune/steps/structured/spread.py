"""One budget or several, spread over layers and their parts so that the sum of what is lost is least: an integer program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

_SECONDS, _GAP = 60.0, 1e-4  # HiGHS stops after so long, or so near to the best that there can be


@dataclass(frozen=True, slots=True)
class Choice:
    """So many parts of a kind `gone`: what that loses, and what it `saves` of each resource."""

    gone: int
    loss: float
    saves: Sequence[float]


@dataclass(frozen=True, slots=True)
class Layer:
    """What the hidden states lose without a layer, what it takes of each resource, and its choices by kind."""

    loss: float
    costs: Sequence[float]
    parts: Mapping[str, Sequence[Choice]]


@dataclass(frozen=True, slots=True)
class Shape:
    """What goes: whole layers, of each other layer so many parts by kind; and the sum of what is lost."""

    dropped: Sequence[int]
    gone: Sequence[Mapping[str, int]]
    loss: float


class _Rows:
    """Linear constraints, row by row, between bounds."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, float]] = []
        self._bounds: list[tuple[float, float]] = []

    def add(self, terms: Iterable[tuple[int, float]], least: float, most: float) -> None:
        self._entries += [(len(self._bounds), column, value) for column, value in terms]
        self._bounds.append((least, most))

    def constraint(self, columns: int) -> LinearConstraint:
        rows, places, values = zip(*self._entries, strict=True)
        least, most = zip(*self._bounds, strict=True)
        return LinearConstraint(coo_array((values, (rows, places)), (len(self._bounds), columns)).tocsr(), least, most)


class Program:
    """Which layers go, and how many parts of these `kinds` of every other.

    Variables are 0 or 1: one a layer, which is dropped or not; one a layer, kind and choice. Where all layers are to have the
    same numbers, one more a kind and choice, which bounds those of the layers; these are then whole by themselves.

    Args:
        most: of each resource, what all layers may take together.
        equal: all layers have as many parts; each has the same choices.
    """

    def __init__(self, layers: Sequence[Layer], kinds: Sequence[str], most: Sequence[float], *, equal: bool) -> None:
        self._layers, self._kinds, self._equal = layers, kinds, equal
        numbers = iter(range(2**31))
        self._drop = [next(numbers) for _ in layers]
        self._own = [{kind: [next(numbers) for _ in layer.parts[kind]] for kind in kinds} for layer in layers]
        self._all = {kind: [next(numbers) for _ in layers[0].parts[kind]] for kind in kinds} if equal else {}
        self._count, self._rows = next(numbers), _Rows()
        for drop, own in zip(self._drop, self._own, strict=True):
            for kind in kinds:
                self._rows.add([(drop, 1.0), *((one, 1.0) for one in own[kind])], 1, 1)
                if equal:
                    for one, every in zip(own[kind], self._all[kind], strict=True):
                        self._rows.add([(one, 1.0), (every, -1.0)], -1, 0)
        for choices in self._all.values():
            self._rows.add([(one, 1.0) for one in choices], 1, 1)
        self._rows.add([(one, 1.0) for one in self._drop], 0, len(layers) - 1)
        for number, limit in enumerate(most):
            whole = sum(layer.costs[number] for layer in layers)
            scale = max(abs(whole), abs(limit), 1e-12)  # else the solver's tolerance would be of another size for each
            self._rows.add(((one, value / scale) for one, value in self._saved(number)), (whole - limit) / scale, np.inf)

    def _saved(self, resource: int) -> Iterator[tuple[int, float]]:
        for drop, own, layer in zip(self._drop, self._own, self._layers, strict=True):
            yield drop, layer.costs[resource]
            for kind in self._kinds:
                for one, choice in zip(own[kind], layer.parts[kind], strict=True):
                    if choice.saves[resource]:
                        yield one, choice.saves[resource]

    def forbid(self, shape: Shape) -> None:
        """Find another one than `shape`; where all layers have as many parts, other numbers of parts."""
        left = [number for number in range(len(self._layers)) if number not in shape.dropped]
        if self._equal:
            terms = [self._one(self._all, 0, kind, shape.gone[0][kind]) for kind in self._kinds]
        else:
            terms = [self._drop[number] for number in shape.dropped]
            terms += [
                self._one(self._own[number], number, kind, gone[kind])
                for number, gone in zip(left, shape.gone, strict=True)
                for kind in self._kinds
            ]
        self._rows.add([(one, 1.0) for one in terms], 0, len(terms) - 1)

    def _one(self, variables: Mapping[str, Sequence[int]], layer: int, kind: str, gone: int) -> int:
        choices = self._layers[layer].parts[kind]
        return next(one for one, choice in zip(variables[kind], choices, strict=True) if choice.gone == gone)

    def best(self) -> Shape | None:
        """What loses least; None where nothing keeps within the budgets."""
        losses = np.zeros(self._count)
        for drop, own, layer in zip(self._drop, self._own, self._layers, strict=True):
            losses[drop] = layer.loss
            for kind in self._kinds:
                losses[own[kind]] = [choice.loss for choice in layer.parts[kind]]
        found = milp(
            losses,
            integrality=self._whole(),
            bounds=Bounds(0, 1),
            constraints=self._rows.constraint(self._count),
            options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
        )
        if found.x is None:
            return None
        dropped = [number for number, one in enumerate(self._drop) if found.x[one] > 0.5]
        left = [number for number in range(len(self._layers)) if number not in dropped]
        return Shape(dropped, [self._gone(number, found.x) for number in left], float(found.fun))

    def _whole(self) -> np.ndarray:
        """1 for a variable that must be whole."""
        whole = np.ones(self._count, dtype=np.uint8)
        if self._equal:
            for own in self._own:
                for kind in self._kinds:
                    whole[own[kind]] = 0
        return whole

    def _gone(self, layer: int, x: np.ndarray) -> dict[str, int]:
        parts, own = self._layers[layer].parts, self._own[layer]
        return {kind: parts[kind][int(np.argmax(x[own[kind]]))].gone for kind in self._kinds}
