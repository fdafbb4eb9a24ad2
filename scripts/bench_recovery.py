"""What training after pruning gains: the bundled model pruned so or so, then trained.

    python scripts/bench_recovery.py --output eval/results/recovery.json --text FILE [--tokens 300K] [--seeds 0 1]

Several sparsities, such as 30%,50%,70%, are pruned to and trained at in turns, on as many tokens in all.

Losses are nats a token more than the dense model on held-out documentation, and KL from the dense model on another text, before
and after, all in float32. Rows that the output file has are kept. Beside it: the table in Markdown (.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from compare_allocation import divergence

import llmprune
from llmprune.base.hardware import processor_name
from llmprune.base.notation import read_count
from llmprune.job.record import excess_loss, versions
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import resolve
from llmprune.runs.compare_texts import dense_perplexity, evaluation, load_float32

WINDOWS, LENGTH, SAMPLES = 100, 512, 128
Row = dict[str, Any]
SOME: Row = {"calibration": "pydoc", "samples": SAMPLES, "seqlen": LENGTH, "eval_text": "none", "dtype": "float32"}
NUMBERS = ("loss_before", "loss_after", "kl_before", "kl_after")
# how it is pruned, and how it is trained: the first of each is what the others are compared with
STARTS: dict[str, dict[str, Any]] = {
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda": {"method": "wanda"},
    "magnitude": {"method": "magnitude"},
}
SHORT = ("balanced", "best")
TRAININGS: dict[str, list[dict[str, Any]]] = {  # one after the other, on equal parts of the tokens
    "kept, kd": [{}],
    "blocks": [{"train": "blocks"}],
    "blocks, then kept, kd": [{"train": "blocks"}, {}],
    "lora, kd": [{"train": "lora"}],
    "kept, ce": [{"loss": "ce"}],
    "small, kd": [{"train": "small"}],
}
TURNS = "30%,50%,70%"
CELLS: list[tuple[str, str, str]] = [
    *(("balanced", "2:4", training) for training in TRAININGS),
    *((start, "2:4", training) for training in ("kept, kd", "blocks") for start in ("magnitude", "wanda", "sparsegpt", "best")),
    *((start, pattern, training) for pattern in ("70%", "50%") for training in ("kept, kd", "blocks") for start in SHORT),
    *(("balanced", pattern, training) for pattern in ("25% neurons", "50% neurons") for training in ("kept, kd", "blocks")),
    ("balanced", TURNS, "kept, kd"),
]


def lost(folder: Path, text: str) -> tuple[float, float]:
    """Excess loss on held-out documentation, and KL on another text."""
    source = resolve("llama").path
    model = load_float32(folder)
    found = excess_loss(dense_perplexity(source, WINDOWS), perplexity(model, evaluation(source, WINDOWS)[1]))
    return found, divergence(source, text, model)


def start(name: str, pattern: str, folder: Path) -> Path:
    """The bundled model, pruned; once."""
    output = folder / f"{name}-{pattern}".replace(":", "of").replace(" ", "-").replace("%", "pct")
    if not output.exists():
        how: dict[str, Any] = {"sparsity": pattern, **STARTS[name]}
        if pattern.endswith(" neurons"):
            how = {"neurons": pattern.removesuffix(" neurons")}
        llmprune.prune("llama", output=output, **SOME, **how)
    return output


def measure(name: str, pattern: str, training: str, seed: int, args: argparse.Namespace, folder: Path) -> Row:
    *turns, last = pattern.split(",")
    source, output = start(name, last, folder), folder / "trained"
    before, steps = lost(source, args.text), TRAININGS[training]
    each = str(read_count("tokens", args.tokens) // len([*turns, *steps]))
    if turns:
        record = llmprune.prune(
            "llama", output=output, sparsity=pattern, overwrite=True, recover=each, **SOME, **STARTS[name]
        ).record
    for number, step in enumerate([] if turns else steps):
        options: Row = {"tokens": each, "seed": seed, "eval_text": "none", "overwrite": True, **step}
        output = folder / f"trained{number}"
        record = llmprune.recover(source, output, **options).record
        source = output
    found = record.recoveries
    after = lost(output, args.text)
    return {
        **{"start": name, "pattern": pattern, "training": training, "seed": seed, "asked": args.tokens},
        "tokens": sum(one["tokens"] for one in found),
        **{"rate": found[-1].get("rate"), "loss_before": before[0], "loss_after": after[0]},
        **{"kl_before": before[1], "kl_after": after[1], "seconds": sum(one["seconds"] for one in found)},
        **{"held_out": found[-1].get("held_out"), "date": date.today().isoformat()},
    }


def measured(result: Row) -> str:
    """The table, and how it was measured."""
    lines = [
        f"Bundled model, {SAMPLES} calibration windows of {LENGTH} tokens, then trained on its own training part of `pydoc`,",
        f"one thread of {result['device']}. Loss: nats a token more than the dense model on {WINDOWS} windows of held-out",
        f"text; KL: from the dense model on another text ({result['text']}); in float32. Seeds: orders of the training text.",
        "",
        "| pruned by | to | trained | seeds | tokens | loss before | after | share | KL before | after | share | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for same in alike(result["rows"]):
        one = same[0]
        means = {name: mean(row[name] for row in same) for name in ("tokens", *NUMBERS, "seconds")}
        cells = [one["start"] if "neurons" not in one["pattern"] else "second order", one["pattern"], one["training"]]
        cells += [str(len(same)), f"{means['tokens']:,.0f}"]
        for what in ("loss", "kl"):
            before, after = means[f"{what}_before"], means[f"{what}_after"]
            spread = f" ± {stdev(row[f'{what}_after'] for row in same):.4f}" if len(same) > 1 else ""
            cells += [f"{before:.4f}", f"{after:.4f}{spread}", f"{after / before:.2f}"]
        lines.append(f"| {' | '.join([*cells, format(means['seconds'], '.0f')])} |")
    return "\n".join([*lines, ""])


def alike(rows: list[Row]) -> list[list[Row]]:
    """Rows that differ in their seeds alone, in the order of CELLS."""
    cells = [*CELLS, *((row["start"], row["pattern"], row["training"]) for row in rows)]
    keys = {(*cell, row["asked"]): None for cell in cells for row in rows}
    groups = [[row for row in rows if (row["start"], row["pattern"], row["training"], row["asked"]) == key] for key in keys]
    return [group for group in groups if group]


def page(result: Row) -> str:
    return "\n".join(["# What training after pruning gains", "", "By `scripts/bench_recovery.py`.", "", measured(result)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a file to measure KL on")
    parser.add_argument("--tokens", default="300K")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--only", nargs="+", help="patterns (default: all)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    known = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    torch.set_num_threads(1)
    result = {
        "versions": versions(),
        "device": processor_name(torch.device("cpu")),
        "text": Path(args.text).name,
        "rows": known["rows"],
    }
    done = {(row["start"], row["pattern"], row["training"], row["seed"], row["asked"]) for row in result["rows"]}
    cells = [
        cell for cell in CELLS if cell[0] in args.starts and cell[2] in args.trainings and cell[1] in (args.only or [cell[1]])
    ]
    with tempfile.TemporaryDirectory() as folder:
        for cell in [(*cell, seed) for seed in args.seeds for cell in cells]:
            if (*cell, args.tokens) in done:
                continue
            result["rows"].append(measure(*cell, args, Path(folder)))
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            row = result["rows"][-1]
            print(*cell, *(f"{row[name]:.4f}" for name in NUMBERS), flush=True)
    args.output.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
