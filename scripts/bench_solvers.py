"""Measure solvers against plain twins written from the papers' formulas, turn about in one process; print, write JSON.

    python scripts/bench_solvers.py [--sizes 512 1024 2048] [--output eval/results/bench_solvers.json]

Square layers and 1:3.5, at 50% and 2:4: seconds, ratio, relative output error of both, memory that rose beyond the
inputs. What all matrices of an input share (the Gram, SparseGPT's factor) is made before the clock starts; ALPS's
eigendecomposition and our inverses are inside. Other methods are timed alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llmprune import solvers
from llmprune.hardware import peak_memory, restart_peak_memory
from llmprune.linalg import masked_least_squares
from llmprune.patterns import Pattern, parse
from llmprune.report.record import versions
from llmprune.solvers import alps, sparsegpt, wanda
from llmprune.stats import Gram

CPU = torch.device("cpu")
ALONE = ("magnitude", "wanda", "ria", "dsnot", "admm", "annealed")


def plain_sparsegpt(w: Tensor, gram: Gram, pattern: Pattern) -> Tensor:
    """The textbook sweep: after each column, correct all later ones."""
    upper, w = gram.factor.upper, w.clone()
    rows, columns = w.shape
    mask = torch.ones_like(w, dtype=torch.bool)
    step = sparsegpt.BLOCK if pattern.period == 1 else pattern.period
    for j in range(columns):
        if j % step == 0:
            score = (w[:, j : j + step] / upper.diagonal()[j : j + step]).square()
            mask[:, j : j + step] = pattern.keep(score, start=j * rows)
        error = w[:, j].masked_fill(mask[:, j], 0) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return w.masked_fill(~mask, 0)


def plain_refit(h: Tensor, w: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on the kept support; the residual is computed anew in each step, as its definition has it."""
    x = w * mask
    r = (w @ h - x @ h) * mask
    p = r.clone()
    for _ in range(steps):
        step = (r * r).sum(1) / (p * (p @ h)).sum(1).clamp_min(1e-30)
        x = x + step[:, None] * p
        after = (w @ h - x @ h) * mask
        p = after + ((after * after).sum(1) / (r * r).sum(1).clamp_min(1e-30))[:, None] * p
        r = after
    return x


def plain_alps(w: Tensor, gram: Gram, pattern: Pattern) -> Tensor:
    """As published: eigh in float64, an n^3 inverse at the start and after every third iteration."""
    h = gram.mean()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h))
    scale = h.diagonal().sqrt()
    h = h / scale / scale[:, None]
    values, vectors = (part.float() for part in torch.linalg.eigh(h.double()))
    dense, rho = w * scale, alps.RHO
    d, v, mask = dense, torch.zeros_like(dense), pattern.keep(dense.abs())
    kept, last = int(mask.sum()), mask
    inverse = (vectors / (values + rho)) @ vectors.T
    for iteration in range(1, alps.ITERATIONS + 1):
        b = (dense @ h - v + rho * d) @ inverse
        mask = pattern.keep((b + v / rho).abs())
        d = (b + v / rho) * mask
        v = v + rho * (b - d)
        if iteration % alps.CHECK == 0:
            change, last = int((mask ^ last).sum()), mask
            if change == 0 or (iteration >= alps.EARLIEST and change / kept < alps.SETTLED):
                break
            rho *= 1.3 if change > 0.1 * kept else 1.2 if change > 0.005 * kept else 1.1
            inverse = (vectors / (values + rho)) @ vectors.T
    return plain_refit(h, dense, mask, alps.STEPS) / scale


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def layer(rows: int, columns: int) -> tuple[Tensor, Gram]:
    """Random weights and the Gram of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    gram = Gram(columns, CPU)
    gram.add(torch.randn(2 * columns, columns, generator=generator) @ mix)
    return torch.randn(rows, columns, generator=generator), gram


def error(w: Tensor, pruned: Tensor, h: Tensor) -> float:
    lost = (w - pruned).double()
    return float(((lost @ h.double()) * lost).sum() / ((w.double() @ h.double()) * w.double()).sum())


def compare(rows: int, columns: int, sparsity: str, repeats: int) -> list[dict[str, Any]]:
    w, gram = layer(rows, columns)
    pattern, h = parse(sparsity), gram.mean()
    _ = gram.factor
    mask = wanda.solve(w, gram, pattern).mask
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor] | None]] = {
        "sparsegpt": (lambda: sparsegpt.solve(w, gram, pattern).weight, lambda: plain_sparsegpt(w, gram, pattern)),
        "alps": (lambda: alps.solve(w, gram, pattern).weight, lambda: plain_alps(w, gram, pattern)),
        "refit": (
            lambda: masked_least_squares(h, w, mask, w, steps=20, tolerance=0.0).weight,
            lambda: plain_refit(h, w, mask, 20),
        ),
    }
    for name in ALONE:
        pairs[name] = (lambda name=name: solvers.load(name).solve(w, gram, pattern).weight, None)  # type: ignore[misc]
    return [
        {"solver": name, "shape": [rows, columns], "pattern": sparsity, **measure(w, h, ours, plain, repeats)}
        for name, (ours, plain) in pairs.items()
    ]


def measure(
    w: Tensor, h: Tensor, ours: Callable[[], Tensor], plain: Callable[[], Tensor] | None, repeats: int
) -> dict[str, Any]:
    restart_peak_memory()
    before = peak_memory(CPU)["process"]
    runs = [timed(ours)]
    row: dict[str, Any] = {"memory_bytes": peak_memory(CPU)["process"] - before}
    twins = []
    for turn in range(repeats):
        if turn:
            runs.append(timed(ours))
        if plain is not None:
            twins.append(timed(plain))
    row |= {"seconds": median(seconds for seconds, _ in runs), "error": error(w, runs[0][1], h)}
    if twins:
        row |= {"plain_seconds": median(seconds for seconds, _ in twins), "plain_error": error(w, twins[0][1], h)}
        row["ratio"] = median(b / a for (a, _), (b, _) in zip(runs, twins, strict=True))
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
