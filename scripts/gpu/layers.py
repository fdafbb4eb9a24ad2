"""`layers`: every road of a packed product against dense ones, by shape and tokens; and what this device reaches at best."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache, partial

import torch

from gpu.rows import Found, Row
from gpu.shapes import FUSED, Place, two_of_four
from llmprune.base.hardware import operations_per_second
from llmprune.formats.kernels import dispatch
from llmprune.formats.layer import Sparse24Linear
from llmprune.measure.bench import layer_times
from llmprune.measure.speed import bytes_per_second

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
TUNED = (1, 16)  # tokens for which Inductor's own search stands beside cuBLAS, for the first two shapes


def rows(place: Place) -> list[Row]:
    shapes = [(64, 128)] if place.small else FUSED
    tokens = (1, 4) if place.small else TOKENS
    found = [Row("ceilings", partial(ceilings, place))]
    for shape in shapes:
        found.append(Row(f"prepare {shape[0]}x{shape[1]}", partial(prepare, place, shape)))
        for number in tokens:
            tuned = number in TUNED and shape in shapes[1:3]
            found.append(Row(f"{shape[0]}x{shape[1]} x {number}", partial(times, place, shape, number, tuned)))
    return found


def ceilings(place: Place) -> Found:
    kinds = (torch.bfloat16, torch.float32)
    speed = {str(kind).removeprefix("torch."): operations_per_second(place.device, kind) for kind in kinds}
    return {"bytes_per_second": bytes_per_second(place.device), "operations_per_second": speed}


def prepare(place: Place, shape: tuple[int, int]) -> Found:
    """Its seconds are the row's."""
    layer = _layer(place, shape)
    return {"blob": layer.blob is not None}


def times(place: Place, shape: tuple[int, int], tokens: int, tuned: bool) -> Found:
    layer = _layer(place, shape)
    (time,) = layer_times(layer, 1, [tokens], place.device, lambda text: None, tuned=tuned)
    return asdict(time) | {
        "speedup": time.speedup,
        "rate": time.packed_bytes / time.packed,
        "roads": dispatch.roads_measured(layer.packed, tokens, layer.blob) if place.fast else {},
    }


@cache
def _layer(place: Place, shape: tuple[int, int]) -> Sparse24Linear:
    layer = Sparse24Linear.from_dense(two_of_four(*shape, torch.bfloat16, place.device))
    layer.prepare()
    return layer
