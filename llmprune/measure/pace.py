"""How long layers of every size take: models of a few layers, timed turn about with one whose layers are whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmprune.cost.milliseconds import Pace, Table
from llmprune.measure.whole import Use, compared

_WHOLE, _SMALLER = 6.0, 2.0  # seconds of timing: whole layers, and each smaller size
_UNCACHED = 2**27  # bytes of weights from which few are found in a cache
Build = Callable[[int], PreTrainedModel]  # a model of so many layers, with weights of no value


def layers_to_time(nbytes: int, count: int) -> int:
    """How many of `count` layers of so many bytes each are built: as many as no cache holds, and at least two."""
    return min(count, max(2, -(-_UNCACHED // max(nbytes, 1))))


@dataclass(frozen=True, slots=True)
class Timed:
    """What is timed.

    Attributes:
        name: of the model, in the table's rows; `layers` are built of it.
        whole: builds it as it is; `smaller`: with layers of one size less, by kind, parts that are gone, and in words.
    """

    name: str
    layers: int
    whole: Build
    smaller: Mapping[str, Mapping[int, tuple[str, Build]]]


def pace_of(timed: Timed, use: Use, table: Table, device: torch.device, tell: Callable[[str], None]) -> Pace:
    """From the table, after what it lacks has been measured and kept."""

    def row(shape: str) -> str:
        return f"{timed.name} x {timed.layers} | {shape} | dense | {use}"

    outside, layer = row("outside the layers"), row("a whole layer")
    smaller = {kind: {gone: row(shape) for gone, (shape, _) in own.items()} for kind, own in timed.smaller.items()}
    builds = {smaller[kind][gone]: build for kind, own in timed.smaller.items() for gone, (_, build) in own.items()}
    missing = [name for name in builds if name not in table.rows]
    if missing or outside not in table.rows or layer not in table.rows:
        tell(f"measuring how long layers of {len(builds) + 1} sizes take in {use}; what is measured is kept for later runs")
        reference = timed.whole(timed.layers)
        if outside not in table.rows or layer not in table.rows:
            table.keep(dict(zip((outside, layer), _whole(timed, reference, use, device), strict=True)))
            missing = list(builds)  # each is measured beside the whole layers that it is compared with
        known = table.rows[outside] + timed.layers * table.rows[layer]
        for name in missing:
            own, other = compared([reference, builds[name](timed.layers)], use, device, _SMALLER, least=True)
            table.keep({name: max(known * other / own - table.rows[outside], 1e-6) / timed.layers})
    times = {kind: {gone: table.rows[name] for gone, name in own.items()} for kind, own in smaller.items()}
    return Pace(table.rows[outside], table.rows[layer], times)


def _whole(timed: Timed, reference: PreTrainedModel, use: Use, device: torch.device) -> tuple[float, float]:
    """Milliseconds outside the layers and of one: what a model of one layer takes less."""
    if timed.layers == 1:
        (seconds,) = compared([reference], use, device, _WHOLE, least=True)
        return 0.0, 1000 * seconds
    many, one = (1000 * seconds for seconds in compared([reference, timed.whole(1)], use, device, _WHOLE, least=True))
    layer = min((many - one) / (timed.layers - 1), many / timed.layers)
    layer = max(layer, 1e-6)
    return many - timed.layers * layer, layer
