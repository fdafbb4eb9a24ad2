"""Measure solvers against plain twins written from the papers' formulas, turn about in one process; print, write JSON.

    python scripts/bench_solvers.py [--sizes 512 1024 2048] [--output eval/results/bench_solvers.json]

Square layers and 1:3.5, at 50% and 2:4: seconds with everything that is made from the Gram, ratio, relative output error of
both, memory that rose beyond the inputs. The twins are those of the tests (`tests/twins.py`); `annealed` is to be held against
ALPS's. Other methods are timed alone. Medians of three, of fewer where a pair takes long.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llmprune.base.hardware import peak_memory, restart_peak_memory
from llmprune.job.record import versions
from llmprune.numerics.linalg import masked_least_squares
from llmprune.numerics.patterns import parse
from llmprune.numerics.stats import Gram
from llmprune.solvers import METHODS, wanda

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import twins

CPU = torch.device("cpu")
ALONE = ("magnitude", "wanda", "ria", "dsnot", "admm", "annealed")
ENOUGH = 20.0  # seconds after which a pair is not repeated


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random weights and the Gram of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    x = torch.randn(2 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def statistic(h: Tensor) -> Gram:
    """A fresh one: nothing has been computed from it yet."""
    gram = Gram(len(h), CPU)
    gram.tokens, gram.sum = 1, h
    return gram


def error(w: Tensor, pruned: Tensor, h: Tensor) -> float:
    lost = (w - pruned).double()
    return float(((lost @ h.double()) * lost).sum() / ((w.double() @ h.double()) * w.double()).sum())


def compare(rows: int, columns: int, sparsity: str, repeats: int) -> list[dict[str, Any]]:
    w, h = layer(rows, columns)
    pattern = parse(sparsity)
    mask = wanda.solve(w, statistic(h), pattern).mask

    def ours(name: str) -> Callable[[], Tensor]:
        return lambda: METHODS.get(name).solve(w, statistic(h), pattern).weight

    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor] | None]] = {
        "sparsegpt": (ours("sparsegpt"), lambda: twins.sparsegpt(w, h, pattern)),
        "alps": (ours("alps"), lambda: twins.alps(w, h, pattern)),
        "refit": (
            lambda: masked_least_squares(h, w, mask, w, steps=20, tolerance=0.0).weight,
            lambda: twins.refit(h, w, mask, 20),
        ),
    }
    pairs |= {name: (ours(name), None) for name in ALONE}
    return [
        {"solver": name, "shape": [rows, columns], "pattern": sparsity, **measure(w, h, fast, plain, repeats)}
        for name, (fast, plain) in pairs.items()
    ]


def measure(
    w: Tensor, h: Tensor, ours: Callable[[], Tensor], plain: Callable[[], Tensor] | None, repeats: int
) -> dict[str, Any]:
    restart_peak_memory()
    before = peak_memory()
    runs = [timed(ours)]
    row: dict[str, Any] = {"memory_bytes": peak_memory() - before}
    plains: list[tuple[float, Tensor]] = []
    for turn in range(repeats):
        if turn and sum(seconds for seconds, _ in [*runs, *plains]) > ENOUGH:
            break
        if turn:
            runs.append(timed(ours))
        if plain is not None:
            plains.append(timed(plain))
    row |= {"seconds": median(seconds for seconds, _ in runs), "error": error(w, runs[0][1], h)}
    if plains:
        row |= {"plain_seconds": median(seconds for seconds, _ in plains), "plain_error": error(w, plains[0][1], h)}
        row["ratio"] = median(b / a for (a, _), (b, _) in zip(runs, plains, strict=True))
    return row


def gram_against_matmul(columns: int) -> dict[str, Any]:
    """Seconds of one accumulation against a plain product of the same size, turn about."""
    x = torch.randn(4096, columns, generator=torch.Generator().manual_seed(0))
    gram = Gram(columns, CPU)

    def accumulate() -> Tensor:
        gram.add(x)
        return gram.sum

    pairs = [(timed(accumulate)[0], timed(lambda: x.T @ x)[0]) for _ in range(7)]
    return {"columns": columns, "tokens": 4096, "ratio": median(a / b for a, b in pairs)}


def show(row: dict[str, Any]) -> None:
    shape = "x".join(map(str, row["shape"]))
    line = f"{row['solver']:<10} {shape:<10} {row['pattern']:<4} {row['seconds']:8.3f} s  error {row['error']:.5f}"
    if "ratio" in row:
        line += f"  twin {row['plain_seconds']:8.3f} s  {row['ratio']:5.1f}x  error {row['plain_error']:.5f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        for shape in ((size, size), (size * 7 // 2, size)):
            for sparsity in ("50%", "2:4"):
                rows += compare(*shape, sparsity, args.repeats)
                for row in rows[-len(ALONE) - 3 :]:
                    show(row)
    grams = [gram_against_matmul(size) for size in args.sizes]
    print(*(f"Gram of {g['columns']} columns: {g['ratio']:.2f}x a plain product" for g in grams), sep="\n")
    if args.output:
        result = {"date": date.today().isoformat(), "versions": versions(), "threads": torch.get_num_threads()}
        args.output.write_text(json.dumps(result | {"gram": grams, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
