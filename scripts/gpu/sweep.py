"""`sweep`: settings of the kernels for few tokens by shape. What is clearly better than the defaults goes into the table that
`llmprune/formats/kernels/plan.py` reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product
from math import exp, log
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from gpu.rows import Found, Row
from gpu.shapes import FUSED, Place, two_of_four
from llmprune.base.hardware import synchronize
from llmprune.formats.kernels import decode, gemv, reference
from llmprune.formats.kernels.plan import SETTINGS, Rows, Settings, Shape
from llmprune.formats.kernels.reference import Packed
from llmprune.formats.kernels.timing import copies, graphed

SIZES = (1, 2, 8, 16, 32, 64)  # tokens: those of `gemv24`, and as `decode24` pads them
WAVES = (1, 2, 3, 4, 6)
Own = Settings | Rows
_WORKERS, _REPLAYS, _SHOWN = 14, 8, 6
_BETTER = 1.05  # times as fast as the default that is worth a row in the table: between two sweeps a time differs by 2% to 4%


def rows(place: Place) -> list[Row]:
    shapes, sizes = ([(16, 64)], (1, 8)) if place.small else (FUSED, SIZES)
    found = [] if place.small else [Row("compile", partial(compile_all, place))]
    for size in sizes:
        each = {f"{rows}x{columns} x {size}": partial(by_shape, place, (rows, columns), size) for rows, columns in shapes}
        found += [Row(key, work) for key, work in each.items()]
        found.append(Row(f"best of all shapes x {size}", partial(best_of_all, place, shapes, size)))
    return found


def kernels(size: int) -> list[Own]:
    """Those that are compiled, for so many tokens; waves only change the grid."""
    if size <= gemv.MOST:
        return [Rows(*own) for own in product((4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8)) if fits(*own)]
    joined = (True, False) if size <= 16 else (False,)
    shapes = ((32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (128, 8))  # rows, warps
    return [Settings(*own, stages=stages, joined=one) for own, stages, one in product(shapes, (2, 3, 4), joined)]


def fits(rows: int, warps: int, chunks: int) -> bool:
    """Whether a thread has one to four quarters of a word vector: all threads work, and registers hold what they read."""
    return 1 <= rows * chunks * 4 / (32 * warps) <= 4


def compile_all(place: Place) -> Found:
    """In several processes, into Triton's cache."""
    start, scripts = time.perf_counter(), str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (scripts, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpu.warm"]
    workers = [subprocess.Popen([*command, str(i), str(_WORKERS)], env=environment) for i in range(_WORKERS)]
    codes = [worker.wait() for worker in workers]
    return {
        "kernels": sum(len(kernels(size)) for size in SIZES),
        "seconds": time.perf_counter() - start,
        "right": not any(codes),
    }


def by_shape(place: Place, shape: tuple[int, int], size: int) -> Found:
    """Seconds of the default and of the best."""
    found = measured(place, shape, size)
    best = sorted(((seconds, own) for own, seconds in found.items() if own is not None), key=itemgetter(0))[:_SHOWN]
    default, nbytes = found[None], _matrices(place, shape)[0]
    packed = nbytes.values.nbytes + nbytes.meta.nbytes
    return {
        "default": default,
        "best": [asdict(own) | {"seconds": seconds, "rate": packed / seconds} for seconds, own in best],
        "tried": len(found),
    }


def best_of_all(place: Place, shapes: list[tuple[int, int]], size: int) -> Found:
    """The settings whose seconds are least on the geometric mean of shapes, each relative to the shape's best."""
    tables = [measured(place, shape, size) for shape in shapes]
    least = [min(table.values()) for table in tables]
    everywhere = [own for own in tables[0] if own is not None and all(own in table for table in tables)]
    scored = {own: exp(mean(log(table[own] / low) for table, low in zip(tables, least, strict=True))) for own in everywhere}
    best = sorted(((score, own) for own, score in scored.items()), key=itemgetter(0))[:_SHOWN]
    return {"best": [asdict(own) | {"of_the_best": score} for score, own in best]}


def better(rows: Mapping[str, Found]) -> dict[Shape, Settings]:
    """Of a sweep's rows: the settings of `decode24` by shape that are clearly better than those of all shapes."""
    found: dict[Shape, Settings] = {}
    for key, row in rows.items():
        matched = re.fullmatch(r"(\d+)x(\d+) x (\d+)", key)
        if not matched or "best" not in row or (size := int(matched[3])) not in SETTINGS:
            continue
        times = {Settings(**{name: own[name] for name in asdict(SETTINGS[size])}): own["seconds"] for own in row["best"]}
        best = min(times, key=times.__getitem__)
        if times.get(SETTINGS[size], row["default"]) / times[best] > _BETTER:
            found[int(matched[1]), int(matched[2]), size] = best
    return found


@cache
def measured(place: Place, shape: tuple[int, int], size: int) -> dict[Own | None, float]:
    """Seconds of one product by settings; None: as the kernel's own table has it. What fails is left out."""
    mats = _matrices(place, shape)
    x = torch.randn(size, shape[1], device=place.device, dtype=torch.bfloat16)
    expected = x.double() @ reference.unpack(mats[0]).double().T
    tried: list[Own | None] = [None]
    few = 2 if place.small else None
    for own in kernels(size)[:few]:
        tried += [own] if isinstance(own, Rows) else [replace(own, waves=waves) for waves in WAVES[:few]]
    found: dict[Own | None, float] = {}
    for settings in tried:
        try:
            gap = (product_of(place, x, mats[0], settings).double() - expected).norm() / expected.norm()
            if gap < 1e-2:
                found[settings] = _seconds(place, x, mats, settings)
        except triton_errors():
            continue
    return found


def triton_errors() -> tuple[type[Exception], ...]:
    """What a kernel raises that cannot be compiled or launched with such settings."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    return (RuntimeError, ValueError, OutOfResources, CompilationError)


def product_of(place: Place, x: Tensor, packed: Packed, settings: Any) -> Tensor:
    args: tuple[Any, ...] = (x, packed.values, packed.meta, None)
    if len(x) <= gemv.MOST:
        return gemv.gemv24(*args, fast=place.fast, settings=settings)
    processors, shared = place.processors, place.shared
    return decode.decode24(*args, processors=processors, shared=shared, fast=place.fast, settings=settings)


def _seconds(place: Place, x: Tensor, mats: list[Packed], settings: Own | None) -> float:
    replay = graphed([partial(product_of, place, x, packed, settings) for packed in mats], place.device)
    times = []
    for _ in range(1 if place.small else _REPLAYS):
        synchronize(place.device)
        start = time.perf_counter()
        replay()
        synchronize(place.device)
        times.append((time.perf_counter() - start) / len(mats))
    return min(times)


@cache
def _matrices(place: Place, shape: tuple[int, int]) -> list[Packed]:
    packed = reference.pack(two_of_four(*shape, torch.bfloat16, place.device))
    many = 2 if place.small else copies(packed.values.nbytes + packed.meta.nbytes, place.device)
    return [packed, *(Packed(packed.values.clone(), packed.meta.clone(), packed.columns) for _ in range(many - 1))]
