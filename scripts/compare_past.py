"""What each addition to the presets gains at no cost when the model runs, alone and together.

    python scripts/compare_past.py --output eval/results/past.json --models llama FOLDER ... --text FILE
        [--patterns 2:4] [--terms fast "fast permute"] [--seeds 0 1 2]

A term is a preset and options that are switched on. Excess losses are on held-out documentation, KL(dense || pruned) a token on
that and on the first windows of another text, all computed in float32 from the folder that was written. Cells that the output
file has are kept. Beside it: the table in Markdown (.md).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from compare_allocation import LENGTH, OTHER, SAMPLES, log_probabilities, mean_divergence, shown

import llmprune
from llmprune.data.windows import Windows
from llmprune.job.record import versions
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import resolve
from llmprune.runs.compare_texts import dense_perplexity, evaluation, load_float32

WINDOWS = 238  # all of the text
PATTERNS = ("2:4", "50%", "70%")
TERMS = ("fast", "fast rotate", "fast permute", "best", "best rotate", "best permute", "max")
TRAINED = {"small": 3.5, "llama": 4.5, "tiny20": 20, "tiny150": 150}  # tokens a parameter, by each model's training.json
Cell = dict[str, Any]


@cache
def texts(folder: Path, text: str | None) -> dict[str, Windows]:
    own = {"documentation": evaluation(folder, WINDOWS)[1]}
    return own | ({"other": evaluation(folder, OTHER, text, LENGTH)[1]} if text else {})


@cache
@torch.no_grad()
def dense_log_probabilities(folder: Path, text: str | None, name: str) -> list[torch.Tensor]:
    return list(log_probabilities(load_float32(folder), few(texts(folder, text)[name])))


def few(windows: Windows) -> Windows:
    """Those that divergences are measured on."""
    return Windows(windows.ids[:OTHER], windows.text)


@torch.no_grad()
def measure(name: str, term: str, pattern: str, seed: int, text: str | None) -> Cell:
    folder, (quality, *switches) = resolve(name).path, term.split()
    options: dict[str, Any] = {"calibration": "pydoc", "eval_text": "none", "samples": SAMPLES, "seqlen": LENGTH, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        on: dict[str, Any] = dict.fromkeys(switches, True)
        llmprune.prune(folder, sparsity=pattern, quality=quality, output=f"{scratch}/out", dtype="float32", **on, **options)
        seconds = time.perf_counter() - start
        model = load_float32(Path(scratch, "out"))
    kl = {
        which: mean_divergence(dense_log_probabilities(folder, text, which), log_probabilities(model, few(windows)))
        for which, windows in texts(folder, text).items()
    }
    held_out = texts(folder, text)["documentation"]
    loss = math.log(perplexity(model, held_out).value / dense_perplexity(folder, WINDOWS).value)
    return {
        **{"model": Path(name).name, "term": term, "pattern": pattern, "seed": seed, "excess_loss": loss, "divergence": kl},
        **{"seconds": seconds, "date": date.today().isoformat()},
    }


def preset_of(term: str) -> str:
    """That which a term adds to."""
    return "best" if term == "max" else term.split()[0]


def paired(cells: Sequence[Cell], model: str, pattern: str, term: str) -> list[tuple[Cell, Cell]]:
    """Those of a term, each with that of the preset alone with the same draw; of `max` with that of `best`."""
    own, base = (
        {cell["seed"]: cell for cell in cells if (cell["model"], cell["pattern"], cell["term"]) == (model, pattern, wanted)}
        for wanted in (term, preset_of(term))
    )
    return [(cell, base[seed]) for seed, cell in own.items() if seed in base]


def over(pairs: Sequence[tuple[Cell, Cell]], which: str) -> list[float]:
    """One's loss over the other's, or a divergence over the other's."""
    if which == "loss":
        return [one["excess_loss"] / other["excess_loss"] for one, other in pairs]
    known = [(one["divergence"], other["divergence"]) for one, other in pairs]
    return [one[which] / other[which] for one, other in known if which in one and which in other]


def trained(result: dict[str, Any]) -> str:
    """A row a term and pattern, a column a model, by how long it was trained: mean ratios of loss and of KL."""
    cells = result["cells"]
    heads = ["term", "beside", "pattern", *(f"`{model}`, {tokens:g}" for model, tokens in TRAINED.items())]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|---|{'---:|' * len(TRAINED)}"]
    for term, pattern in product(TERMS, PATTERNS):
        pairs = [paired(cells, model, pattern, term) for model in TRAINED]
        if term == preset_of(term) or not all(pairs):
            continue
        means = [(mean(over(own, "loss")), mean(over(own, "documentation"))) for own in pairs]
        row = [term, preset_of(term), pattern, *(f"{loss:.2f} / {kl:.2f}" for loss, kl in means)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def table(cells: Sequence[Cell]) -> str:
    """A row a model, pattern and term: what it loses, and each number over that of the preset alone with the same draw."""
    heads = ["model", "pattern", "term", "excess loss", "of the preset's", "KL, documentation", "KL, another text", "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|---|---|---|{'---:|' * (len(heads) - 3)}"]
    for model, pattern, term in sorted({(cell["model"], cell["pattern"], cell["term"]) for cell in cells}, key=_order):
        own = [cell for cell in cells if (cell["model"], cell["pattern"], cell["term"]) == (model, pattern, term)]
        pairs = paired(cells, model, pattern, term)
        row = [model, pattern, term, shown([cell["excess_loss"] for cell in own], 4)]
        row += [shown(over(pairs, which), 2) for which in ("loss", "documentation", "other")]
        row.append(shown([one["seconds"] / other["seconds"] for one, other in pairs], 1))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def page(result: dict[str, Any]) -> str:
    title = ["# What additions that cost nothing at inference gain", "", "By `scripts/compare_past.py`.", ""]
    return "\n".join([*title, measured(result)])


def measured(result: dict[str, Any]) -> str:
    """The table, and how it was measured."""
    lines = [
        f"{SAMPLES} calibration windows of {LENGTH} tokens, float32; excess loss on {WINDOWS} windows of documentation, KL",
        f"from the dense model on {OTHER} of those and of another text ({result['text']}). Ratios are those to the preset",
        "alone with the same draw, of `max` to `best`: mean ± standard deviation (draws). Seconds are of the whole run without",
        "evaluation, beside other work.",
        "",
        table(result["cells"]),
    ]
    return "\n".join(lines)


def _order(key: tuple[str, str, str]) -> tuple[Any, ...]:
    return key[0] != "llama", key[0], PATTERNS.index(key[1]), key[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["2:4"])
    parser.add_argument("--terms", nargs="+", default=list(TERMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--text", help="a file or a text's name for KL (default: none)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"text": args.text and Path(args.text).name, "versions": versions(), "cells": []}
    if args.output.exists():
        result["cells"] = json.loads(args.output.read_text())["cells"]
    done = {(cell["model"], cell["term"], cell["pattern"], cell["seed"]) for cell in result["cells"]}
    for seed, name, pattern, term in product(args.seeds, args.models, args.patterns, args.terms):
        if (Path(name).name, term, pattern, seed) in done:
            continue
        cell = measure(name, term, pattern, seed, args.text)
        result["cells"].append(cell)
        said = f"{cell['excess_loss']:.4f}, KL {', '.join(f'{one:.4f}' for one in cell['divergence'].values())}"
        print(f"{cell['model']}  {pattern}  {term}  seed {seed}: {said}, {cell['seconds']:.0f} s", flush=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
