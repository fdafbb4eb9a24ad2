"""Prune models by every method and preset to several patterns; record perplexity, excess loss, error, seconds and memory.

    python scripts/compare_methods.py --models llama DIR ... --output eval/results/methods.json

Calibration is 128 windows of the documentation's calibration split, evaluation the first windows of its evaluation split,
which neither training nor calibration saw; all cells share both. Cells that the output file already has are kept, so that
the command can be stopped and run again. Prints the tables in Markdown.
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

METHODS = ("sparsegpt", "alps", *QUALITIES, "wanda", "admm", "dsnot", "ria", "magnitude")
PATTERNS = ("2:4", "70%", "50%", "60%", "4:8")


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


def markdown(cells: list[dict[str, Any]]) -> str:
    """A table a model: excess loss by method x pattern; of the first pattern also what else was measured."""
    lines: list[str] = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = {(cell["method"], cell["sparsity"]): cell for cell in cells if cell["model"] == model}
        dense = next(iter(own.values()))["dense"]
        first, *_ = PATTERNS
        lines += [
            f"`{model}`, dense perplexity {dense:.2f}; excess loss in nats a token:",
            "",
            f"| method | {' | '.join(PATTERNS)} | perplexity {first} | output error | seconds | peak memory |",
            f"|---|{'---|' * (len(PATTERNS) + 4)}",
        ]
        for method in (method for method in METHODS if (method, first) in own):
            losses = [f"{own[method, p]['excess_loss']:.4f}" if (method, p) in own else "" for p in PATTERNS]
            cell = own[method, first]
            rest = [f"{cell['perplexity']:.2f}", f"{cell['output_error']:.2%}", f"{cell['seconds']:.0f}"]
            lines.append(f"| {method} | {' | '.join(losses + rest)} | {cell['peak_memory_bytes'] / 2**20:,.0f} MiB |")
        lines.append("")
    return "\n".join(lines)


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
    print(markdown(cells))


if __name__ == "__main__":
    main()
