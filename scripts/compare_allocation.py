"""What spreading the sparsity gains: the same models pruned to the same number of weights, spread in every way there is.

    python scripts/compare_allocation.py --output eval/results/allocation.json --models llama FOLDER ... \\
        [--qualities fast] [--ways uniform sensitivity] [--patterns 60%] [--seeds 3] [--text FILE]

Losses are excess losses on held-out documentation, all computed in float32; with `--text`, also KL(dense || pruned) a token on
the first windows of another text. Cells that the output file has are kept. Beside it: the table in Markdown (.md).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

import llmprune
from llmprune.data.windows import Windows
from llmprune.job.record import versions
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import resolve
from llmprune.runs.compare_texts import dense_perplexity, evaluation, load_float32
from llmprune.steps.weights.allocate import ALLOCATORS

QUALITIES, PATTERNS = ("fast", "balanced", "best"), ("50%", "60%", "70%", "2:4")
WINDOWS, OTHER, LENGTH, SAMPLES = 100, 40, 512, 128
UNIFORM = "uniform"
Cell = dict[str, Any]


@cache
@torch.no_grad()
def dense_log_probabilities(folder: Path, text: str) -> list[torch.Tensor]:
    return list(log_probabilities(load_float32(folder), other_text(folder, text)))


def log_probabilities(model: PreTrainedModel, windows: Windows) -> Iterator[torch.Tensor]:
    """Of each window's next tokens, (tokens, vocabulary)."""
    return (functional.log_softmax(model(ids[None]).logits[0], dim=-1) for ids in windows.ids)


def other_text(folder: Path, text: str) -> Windows:
    return evaluation(folder, OTHER, text, LENGTH)[1]


@torch.no_grad()
def divergence(folder: Path, text: str, model: PreTrainedModel) -> float:
    """KL(dense || model), nats a token."""
    return mean_divergence(dense_log_probabilities(folder, text), log_probabilities(model, other_text(folder, text)))


def mean_divergence(dense: Iterable[torch.Tensor], own: Iterable[torch.Tensor]) -> float:
    """KL(dense || own), nats a token, of windows of log probabilities."""
    pairs = zip(dense, own, strict=True)
    return float(torch.stack([functional.kl_div(b, a, reduction="batchmean", log_target=True) for a, b in pairs]).mean())


def measure(name: str, quality: str, pattern: str, way: str, seed: int, text: str | None) -> Cell:
    folder = resolve(name).path
    tokenizer, held_out = evaluation(folder, WINDOWS)
    model = load_float32(folder)
    options: dict[str, Any] = {"calibration": "pydoc", "eval_text": "none", "samples": SAMPLES, "seqlen": LENGTH, "seed": seed}
    run = llmprune.prune(model, tokenizer=tokenizer, quality=quality, sparsity=pattern, allocate=way, **options)
    loss = math.log(perplexity(model, held_out).value / dense_perplexity(folder, WINDOWS).value)
    return {
        **{"model": Path(name).name, "quality": quality, "pattern": pattern, "way": way, "seed": seed, "excess_loss": loss},
        "divergence": divergence(folder, text, model) if text else None,
        "seconds": run.record.seconds,
        "allocation": run.record.recipe.get("allocation"),
        "date": date.today().isoformat(),
    }


def table(cells: Sequence[Cell]) -> str:
    """A row a model, preset and pattern: the uniform loss, and of each other way its share of that."""
    ways = [way for way in ALLOCATORS.names() if way != UNIFORM and any(cell["way"] == way for cell in cells)]
    head = ["model", "preset", "pattern", "uniform, nats a token", *ways, *(f"{way}: KL, another text" for way in ways)]
    head += [f"{way}: seconds" for way in ways]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for key in dict.fromkeys((cell["model"], cell["quality"], cell["pattern"]) for cell in sorted(cells, key=_order)):
        own = {(cell["way"], cell["seed"]): cell for cell in cells if (cell["model"], cell["quality"], cell["pattern"]) == key}
        if uniform := [cell["excess_loss"] for (way, _), cell in own.items() if way == UNIFORM]:
            row = [*key, shown(uniform, 4)]
            row += [shown(ratios(own, way, lambda cell: cell["excess_loss"]), 2) for way in ways]
            row += [shown(ratios(own, way, lambda cell: cell["divergence"]), 2) for way in ways]
            row += [shown(ratios(own, way, lambda cell: sum(cell["seconds"].values())), 1) for way in ways]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def _order(cell: Cell) -> tuple[Any, ...]:
    return cell["model"] != "llama", cell["model"], QUALITIES.index(cell["quality"]), PATTERNS.index(cell["pattern"])


def ratios(own: dict[tuple[str, int], Cell], way: str, value: Any) -> list[float]:
    """A way's values, each relative to that of `uniform` with the same draw."""
    pairs = [(cell, own.get((UNIFORM, seed))) for (name, seed), cell in own.items() if name == way]
    return [value(cell) / value(other) for cell, other in pairs if other and value(cell) and value(other)]


def shown(values: Sequence[float], digits: int) -> str:
    """Mean, standard deviation and number of draws."""
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread} ({len(values)})"


def page(result: dict[str, Any]) -> str:
    title = ["# Where the sparsity goes: what each way to spread it gains", "", "By `scripts/compare_allocation.py`.", ""]
    return "\n".join([*title, measured(result)])


def measured(result: dict[str, Any]) -> str:
    """The table, and how it was measured."""
    lines = [
        f"{SAMPLES} calibration windows of {LENGTH} tokens; excess loss on {WINDOWS} windows of held-out documentation, KL",
        f"from the dense model on {OTHER} windows of another text ({result['text']}), in float32. Of each way: its value over",
        "that of `uniform` with the same draw of calibration text, mean ± standard deviation (draws). As many weights go",
        "everywhere; at 2:4 at most as many bytes stay. Seconds: the pruning's with its scan, over the uniform run's.",
        "",
        table(result["cells"]),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--qualities", nargs="+", choices=QUALITIES, default=list(QUALITIES))
    parser.add_argument("--ways", nargs="+", choices=ALLOCATORS.names(), default=ALLOCATORS.names())
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--text", help="a file or a text's name for KL (default: none)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    known = json.loads(args.output.read_text()) if args.output.exists() else {"cells": []}
    result = {"versions": versions(), "threads": torch.get_num_threads(), "text": known.get("text"), "cells": known["cells"]}
    result["text"] = Path(args.text).name if args.text else result["text"]
    done = {tuple(cell[key] for key in ("model", "quality", "pattern", "way", "seed")) for cell in result["cells"]}
    for name in args.models:
        for cell in ((q, p, w, s) for s in args.seeds for q in args.qualities for p in args.patterns for w in args.ways):
            if (Path(name).name, *cell) in done or ("owl" in cell and "2:4" in cell):
                continue
            result["cells"].append(measure(name, *cell, args.text))
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            own = result["cells"][-1]
            print(name, *cell, f"{own['excess_loss']:.4f} {own['divergence'] or 0:.4f}", own["seconds"], flush=True)
    args.output.with_suffix(".md").write_text(page(result))
    print(table(result["cells"]))


if __name__ == "__main__":
    main()
