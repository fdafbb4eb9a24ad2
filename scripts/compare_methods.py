"""Prune models by every method and preset to several patterns; record perplexity, excess loss, error, seconds and memory.

    python scripts/compare_methods.py --models llama DIR ... --output eval/results/methods.json

Calibration is 128 windows of the documentation's calibration split, evaluation the first windows of its evaluation split,
which neither training nor calibration saw; all cells share both. Cells that the output file already has are kept, so that
the command can be stopped and run again. Beside the file: a listing of all cells (.md) and a plot of excess loss against
seconds (.svg; needs matplotlib). Prints the short tables in Markdown.
"""

from __future__ import annotations

import argparse
import functools
import json
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmprune
from llmprune.data import Windows, evaluation_windows
from llmprune.evaluate.perplexity import Perplexity, excess_loss, perplexity
from llmprune.hardware import peak_memory, restart_peak_memory
from llmprune.models.resolve import resolve
from llmprune.recipes import QUALITIES
from llmprune.report.record import versions

METHODS = ("magnitude", "ria", "dsnot", "wanda", "sparsegpt", "admm", "alps", *QUALITIES)
PATTERNS = ("2:4", "4:8", "50%", "60%", "70%")
_LABELS = {  # where the plot names a method, in points from its dot, so that names do not overlap
    **dict.fromkeys(QUALITIES, ((-4, -13), "right")),
    "ria": ((5, -11), "left"),
    "dsnot": ((-5, 2), "right"),
    "wanda": ((7, -3), "left"),
}
PRICED = "2:4"  # the pattern whose seconds and memory the short table and the plot show


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def evaluation(folder: Path, windows: int) -> tuple[Any, Windows]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = evaluation_windows("pydoc", tokenizer, seqlen=512)
    return tokenizer, Windows(text.ids[:windows], text.text)


@functools.cache
def dense_perplexity(folder: Path, windows: int) -> Perplexity:
    return perplexity(load(folder), evaluation(folder, windows)[1])


def measure(name: str, method: str, sparsity: str, windows: int) -> dict[str, Any]:
    """One cell: a fresh model, pruned in memory in float32."""
    folder = resolve(name).path
    tokenizer, text = evaluation(folder, windows)
    restart_peak_memory()
    model = load(folder)
    how = "quality" if method in QUALITIES else "method"
    options: dict[str, Any] = {how: method, "calibration": "pydoc", "eval_text": "none", "seqlen": 512, "sparsity": sparsity}
    record = llmprune.prune(model, tokenizer=tokenizer, **options).record
    peak = peak_memory(torch.device("cpu"))["process"]
    found, dense = perplexity(model, text), dense_perplexity(folder, windows)
    return {
        "model": Path(name).name,
        "method": method,
        "recipe": record.recipe["text"],
        "sparsity": sparsity,
        "dense": dense.value,
        "perplexity": found.value,
        "excess_loss": excess_loss(dense, found),
        "output_error": mean(site.error for site in record.sites),
        "seconds": record.pruning_seconds(),
        "overhead": record.overhead(),
        "peak_memory_bytes": peak,
    }


def tables(cells: list[dict[str, Any]]) -> str:
    """A table a model: excess loss by method x pattern, and what 2:4 cost."""
    lines: list[str] = []
    for model, own in by_model(cells).items():
        patterns = [p for p in PATTERNS if any(pattern == p for _, pattern in own)]
        lines += [
            f"`{model}`, dense perplexity {next(iter(own.values()))['dense']:.2f}; excess loss in nats a token:",
            "",
            f"| method | {' | '.join(patterns)} | seconds | peak memory |",
            f"|---|{'---:|' * (len(patterns) + 2)}",
        ]
        for method in (method for method in METHODS if (method, PRICED) in own):
            losses = [f"{own[method, p]['excess_loss']:.4f}" if (method, p) in own else "" for p in patterns]
            priced = own[method, PRICED]
            price = [f"{priced['seconds']:.0f}", f"{priced['peak_memory_bytes'] / 2**20:,.0f} MiB"]
            lines.append(f"| {' | '.join([method, *losses, *price])} |")
        lines.append("")
    return "\n".join(lines)


def listing(cells: list[dict[str, Any]]) -> str:
    """Every cell with all that was measured."""
    lines = [
        "# Every method x pattern\n",
        "Written by `scripts/compare_methods.py` from methods.json, which says when and with which versions. Output error:",
        "mean of the matrices', each on the inputs it was solved for. Overhead: pruning as a multiple of its forward passes.\n",
        "| model | pattern | method | perplexity | excess loss | output error | seconds | overhead | peak memory |",
        f"|---|---|---|{'---:|' * 6}",
    ]
    order = sorted(cells, key=lambda c: (c["model"], PATTERNS.index(c["sparsity"]), -c["excess_loss"]))
    for c in order:
        numbers = f"{c['perplexity']:.2f} | {c['excess_loss']:.4f} | {c['output_error']:.2%} | {c['seconds']:.0f}"
        memory = f"{c['peak_memory_bytes'] / 2**20:,.0f} MiB"
        lines.append(f"| {c['model']} | {c['sparsity']} | {c['method']} | {numbers} | {c['overhead']:.2f}x | {memory} |")
    return "\n".join(lines) + "\n"


def plot(cells: list[dict[str, Any]], file: Path) -> None:
    """Excess loss against seconds, one panel a model; the presets in colour."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams |= {"svg.hashsalt": "llmprune", "svg.fonttype": "none", "font.size": 9}
    ink = "#808080"  # readable on light and dark pages
    models = by_model(cells)
    figure, panels = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.4), squeeze=False, layout="constrained")
    for panel, (model, own) in zip(panels[0], models.items(), strict=True):
        at = {m: (own[m, PRICED]["seconds"], own[m, PRICED]["excess_loss"]) for m in METHODS if (m, PRICED) in own}
        panel.plot(*zip(*(at[q] for q in QUALITIES if q in at), strict=True), "o-", color="#d9730d")
        panel.plot(*zip(*(xy for m, xy in at.items() if m not in QUALITIES), strict=True), "o", color=ink)
        for method, xy in at.items():
            color = "#d9730d" if method in QUALITIES else ink
            offset, side = _LABELS.get(method, ((5, 4), "left"))
            panel.annotate(method, xy, offset, textcoords="offset points", color=color, ha=side)
        panel.set(xscale="log", yscale="log", xlabel="seconds of pruning, one core", ylabel="excess loss")
        panel.set_title(f"{model}, {PRICED}")
        for axis, ticks in ((panel.xaxis, (20, 30, 50, 100, 200, 300)), (panel.yaxis, (0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2))):
            low, high = axis.get_view_interval()
            axis.set_ticks([tick for tick in ticks if low <= tick <= high])
            axis.set_ticks([], minor=True)
            axis.set_major_formatter("{x:g}")
        panel.margins(0.15)
        panel.patch.set_alpha(0)
        panel.tick_params(which="both", colors=ink)
        for part in (panel.title, panel.xaxis.label, panel.yaxis.label):
            part.set_color(ink)
        for spine in panel.spines.values():
            spine.set_color(ink)
    figure.patch.set_alpha(0)
    figure.savefig(file, metadata={"Date": None})


def by_model(cells: list[dict[str, Any]]) -> dict[str, dict[tuple[str, str], dict[str, Any]]]:
    """Model -> (method, pattern) -> cell."""
    models: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for cell in cells:
        models.setdefault(cell["model"], {})[cell["method"], cell["sparsity"]] = cell
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--windows", type=int, default=100, help="evaluation windows of 512 tokens")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    cells: list[dict[str, Any]] = json.loads(args.output.read_text())["cells"] if args.output.exists() else []
    done = {(cell["model"], cell["method"], cell["sparsity"]) for cell in cells}
    for name, sparsity, method in ((n, p, m) for n in args.models for p in args.patterns for m in args.methods):
        if (Path(name).name, method, sparsity) in done:
            continue
        cells.append(measure(name, method, sparsity, args.windows))
        result = {"date": date.today().isoformat(), "versions": versions(), "threads": torch.get_num_threads(),
                  "windows": args.windows, "cells": cells}  # fmt: skip
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(cells[-1]), flush=True)
    args.output.with_suffix(".md").write_text(listing(cells))
    plot(cells, args.output.with_suffix(".svg"))
    print(tables(cells))


if __name__ == "__main__":
    main()
