"""What bfloat16 costs: the same models pruned in float32 and in bfloat16, the results measured in float32.

    python scripts/compare_dtypes.py --output eval/results/dtypes.json --models llama FOLDER ... [--seeds 3]

Both prune the same checkpoint on the same windows of the same draw, by the default preset. Perplexity of both is measured in
float32 on held-out text. Cells that the output file has are kept.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import llmprune
from llmprune.base.hardware import pick_device
from llmprune.job.record import versions
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import resolve
from llmprune.models.skeleton import load_config, load_model
from llmprune.runs.compare_texts import dense_perplexity, evaluation

DTYPES = ("float32", "bfloat16")
WINDOWS, LENGTH, PATTERN = 100, 512, "2:4"


def measure(name: str, dtype: str, seed: int) -> dict[str, Any]:
    """One model, pruned in one dtype with one calibration draw."""
    folder = resolve(name).path
    config = load_config(folder)
    tokenizer, text = evaluation(folder, WINDOWS)
    model = load_model(folder, config, pick_device("cpu"), getattr(torch, dtype))
    options: dict[str, Any] = {"calibration": "pydoc", "eval_text": "none", "samples": 128, "seqlen": LENGTH}
    record = llmprune.prune(model, tokenizer=tokenizer, sparsity=PATTERN, seed=seed, **options).record
    excess = math.log(perplexity(model.float(), text).value / dense_perplexity(folder, WINDOWS).value)
    cell = {"model": Path(name).name, "family": config.model_type, "dtype": dtype, "seed": seed, "excess_loss": excess}
    return cell | {"seconds": record.pruning_seconds(), "date": date.today().isoformat()}


def table(result: dict[str, Any]) -> str:
    """A row a model: the loss in each dtype, and the mean of the differences, draw by draw, and what that is uncertain by."""
    lines = [
        "| model | family | excess loss, float32 | bfloat16 | the second less the first, by draw | seconds, second / first |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in dict.fromkeys(cell["model"] for cell in result["cells"]):
        own = {
            dtype: [cell for cell in result["cells"] if (cell["model"], cell["dtype"]) == (model, dtype)] for dtype in DTYPES
        }
        losses = {dtype: [cell["excess_loss"] for cell in own[dtype]] for dtype in DTYPES}
        more = [b - a for a, b in zip(*losses.values(), strict=True)]
        time = sum(cell["seconds"] for cell in own["bfloat16"]) / sum(cell["seconds"] for cell in own["float32"])
        shown = [f"{mean(found):.4f} ± {stdev(found):.4f}" for found in losses.values()]
        row = [model, own["float32"][0]["family"], *shown, f"{mean(more):+.4f} ± {stdev(more):.4f}", f"{time:.2f}"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(["", *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"versions": versions(), "threads": torch.get_num_threads(), "cells": []}
    if args.output.exists():
        result["cells"] = json.loads(args.output.read_text())["cells"]
    done = {(cell["model"], cell["dtype"], cell["seed"]) for cell in result["cells"]}
    for name in args.models:
        for seed, dtype in ((seed, dtype) for seed in range(args.seeds) for dtype in DTYPES):
            if (Path(name).name, dtype, seed) not in done:
                result["cells"].append(measure(name, dtype, seed))
                args.output.write_text(json.dumps(result, indent=1) + "\n")
                print(json.dumps(result["cells"][-1]), flush=True)
    print(table(result))


if __name__ == "__main__":
    main()
