"""`solvers`: seconds and quality of statistics and solvers at the sizes of an 8B model, from inputs that are correlated."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from gpu.rows import Found, Row
from gpu.shapes import SOLVED, Place, correlated
from llmprune.base.hardware import synchronize
from llmprune.numerics.grouping import inverse_of
from llmprune.numerics.linalg import masked_least_squares
from llmprune.numerics.patterns import NM
from llmprune.numerics.rotation import TERMS, Neighbours, Read, Written, find_rotation
from llmprune.numerics.stats import CrossGram, Gram
from llmprune.solvers import METHODS
from llmprune.steps.channels.looking import ROWS

METHODS_TIMED = ("magnitude", "wanda", "sparsegpt", "annealed", "alps", "admm")
ADDED, BATCH = 4, 2**14  # batches of so many tokens
T = TypeVar("T")


def rows(place: Place) -> list[Row]:
    shapes = [(64, 128)] if place.small else SOLVED
    found = []
    for columns in sorted({columns for _, columns in shapes}):
        for dtype in (torch.float32, torch.bfloat16):
            found.append(Row(f"gram {columns} {dtype}", partial(gram_speed, place, columns, dtype)))
        found.append(Row(f"cross {columns}", partial(cross_speed, place, columns)))
        found.append(Row(f"factor {columns}", partial(factor_speed, place, columns)))
    for shape in shapes:
        found += [Row(f"{name} {shape[0]}x{shape[1]}", partial(solve, place, name, shape)) for name in METHODS_TIMED]
        found.append(Row(f"refit {shape[0]}x{shape[1]}", partial(refit, place, shape)))
    hidden = min(rows for rows, _ in shapes)
    found.append(Row(f"rotation {hidden}", partial(rotation, place, hidden)))
    return found


def timed(place: Place, work: Callable[[], T]) -> tuple[float, T]:
    synchronize(place.device)
    start = time.perf_counter()
    result = work()
    synchronize(place.device)
    return time.perf_counter() - start, result


def _repeat(work: Callable[[], None]) -> None:
    for _ in range(ADDED):
        work()


def gram_speed(place: Place, columns: int, dtype: torch.dtype) -> Found:
    """Seconds of 64k tokens, operations a second, and the error against float64 on some of the columns."""
    x = correlated(BATCH if place.fast else 512, columns, place.device).to(dtype)
    gram = Gram(columns, place.device)
    gram.add(x)  # warms up
    seconds, _ = timed(place, partial(_repeat, partial(gram.add, x)))
    exact = (x[:, :256].double().T @ x[:, :256].double()) * (ADDED + 1)
    gap = float((gram.sum[:256, :256] - exact).norm() / exact.norm())
    bound = 1e-5 if dtype == torch.float32 else 2e-4  # tensor cores cut what they sum off, rather than rounding it
    done = 2 * ADDED * len(x) * columns**2
    return {
        "tokens": ADDED * len(x),
        "seconds": seconds,
        "operations_per_second": done / seconds,
        "error": gap,
        "right": gap < bound,
    }


def cross_speed(place: Place, columns: int) -> Found:
    x = correlated(BATCH if place.fast else 512, columns, place.device).bfloat16()
    cross = CrossGram(columns, place.device)
    cross.add(x, x)
    seconds, _ = timed(place, partial(_repeat, partial(cross.add, x, x)))
    return {"tokens": ADDED * len(x), "seconds": seconds, "operations_per_second": 2 * ADDED * len(x) * columns**2 / seconds}


def factor_speed(place: Place, columns: int) -> Found:
    """Seconds of the damped inverse factor."""
    _fresh(place, columns).factor.upper  # noqa: B018  warms up
    gram = _fresh(place, columns)
    return {"seconds": timed(place, lambda: gram.factor)[0]}


def solve(place: Place, name: str, shape: tuple[int, int]) -> Found:
    """Seconds with all that is made from the Gram, the second time; and what is lost of the outputs, relative to them."""
    w = _weights(place, shape)
    for _ in range(2):  # the first warms up
        gram = _fresh(place, shape[1])
        seconds, solved = timed(place, partial(METHODS.get(name).solve, w, gram, NM(2, 4)))
    kept = (solved.weight != 0).view(-1, 4).sum(1)
    lost = _lost(w, solved.weight, gram.mean())
    return {"seconds": seconds, "lost": lost, "right": bool((kept <= 2).all()) and lost < 1}


def refit(place: Place, shape: tuple[int, int]) -> Found:
    """Twenty steps of conjugate gradients on SparseGPT's mask."""
    w, gram = _weights(place, shape), _fresh(place, shape[1])
    solved = METHODS.get("sparsegpt").solve(w, gram, NM(2, 4))
    h = gram.mean()
    work = partial(masked_least_squares, h, w, solved.weight != 0, solved.weight, steps=20, tolerance=0.0)
    work()
    seconds, fitted = timed(place, work)
    before, after = _lost(w, solved.weight, h), _lost(w, fitted.weight, h)
    return {"seconds": seconds, "lost_before": before, "lost": after, "right": after <= before}


def rotation(place: Place, width: int) -> Found:
    """The descent for a rotation of so many channels, of as many matrices as a step takes."""
    h, lines = _sum(place, width).mean(), min(ROWS, width)
    w = torch.randn(2 * TERMS, lines, width, device=place.device) / width**0.5
    whole, part = inverse_of(h), inverse_of(h[:lines, :lines])
    reading = [Read.of(own, whole) for own in w[:TERMS]]
    writing = [Written.of(own.T.contiguous(), part, 4) for own in w[TERMS:]]
    find = partial(find_rotation, reading, writing, Neighbours(4, 2), torch.Generator().manual_seed(0))
    seconds, found = timed(place, find)
    turned = found.matrix[0].double()
    skew = float((turned.T @ turned - torch.eye(width, device=place.device)).abs().max())
    return {"seconds": seconds, "before": found.before, "after": found.after, "skew": skew, "right": skew < 1e-3}


def _lost(w: Tensor, pruned: Tensor, h: Tensor) -> float:
    gap = w - pruned
    return float(((gap @ h) * gap).sum(dtype=torch.float64) / ((w @ h) * w).sum(dtype=torch.float64))


@cache
def _weights(place: Place, shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, device=place.device) / shape[1] ** 0.5


@cache
def _sum(place: Place, columns: int) -> Gram:
    gram = Gram(columns, place.device)
    for _ in range(3 if place.fast else 1):
        gram.add(correlated(BATCH if place.fast else 512, columns, place.device))
    return gram


def _fresh(place: Place, columns: int) -> Gram:
    """One from which nothing has been computed yet."""
    one, gram = _sum(place, columns), Gram(columns, place.device)
    gram.tokens, gram.sum, gram.total = one.tokens, one.sum.clone(), one.total.clone()
    return gram
