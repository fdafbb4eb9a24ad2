"""What a budget of time gives: `target_speedup` asked, predicted and measured; and what it loses against uniform cuts.

    python scripts/bench_budgets.py --output eval/results/budgets.json [--asked 1.25 1.5 2] [--phases decode prefill]

Two models: a random Llama of about 110M parameters, whose speed alone counts, and the bundled model, whose loss on held-out
documentation counts besides. Against the latter: models with the same share of heads and neurons gone in every layer, timed the
same way; their loss at the speed that the budget reached is read off between the two nearest. Rows that the output file has
are kept. Beside it: the tables in Markdown (.md). Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_structured import build, dense_config

import llmprune
from llmprune.base.hardware import processor_name
from llmprune.job.options import PruneConfig
from llmprune.job.record import excess_loss, versions
from llmprune.job.speedup import speedup
from llmprune.measure.perplexity import perplexity
from llmprune.measure.whole import Use, compared
from llmprune.models.resolve import resolve
from llmprune.runs.compare_texts import dense_perplexity, evaluation

CPU = torch.device("cpu")
RANDOM, BUNDLED = "110M, random", "llama"
SHARES = ("12.5%", "25%", "37.5%", "50%", "62.5%", "75%")  # of heads and neurons, in every layer
WINDOWS, SECONDS = 100, 12.0
Row = dict[str, Any]


def asked_of(model: str, phase: str, factor: float, scratch: Path) -> Row:
    """What `target_speedup` gives."""
    options: dict[str, Any] = {"target_speedup": f"{factor:g}x", "for_": phase, "dtype": "float32", "eval_text": "none"}
    if model == RANDOM:
        source = scratch / "random"
        if not source.exists():
            build(dense_config()).save_pretrained(source)
        generator = torch.Generator().manual_seed(0)
        options["calibration"] = torch.randint(16000, (8, 128), generator=generator)
    else:
        source = resolve(model).path
        options |= {"calibration": "pydoc", "samples": 128, "seqlen": 512}
    output = scratch / "out"
    record = llmprune.prune(str(source), output=output, overwrite=True, **options).record
    speed, after = record.structure["speed"], record.structure["after"]
    left = record.model["blocks"] - len(record.structure["removed_layers"])
    row = {"model": model, "phase": phase, "asked": factor, "predicted": speed["predicted"], "measured": speedup(speed)}
    row |= {"dense_ms": speed["dense_ms"], "layers": left, "parameters": after["parameters"], "use": speed["use"]}
    return row | ({"loss": loss_of(output)} if model == BUNDLED else {})


def loss_of(folder: Path) -> float:
    """Excess loss of a model made from the bundled one."""
    source = resolve(BUNDLED).path
    smaller = llmprune.load(folder, device="cpu", dtype="float32")
    return excess_loss(dense_perplexity(source, WINDOWS), perplexity(smaller, evaluation(source, WINDOWS)[1]))


def uniform(share: str, phases: Sequence[str], scratch: Path) -> Row:
    """The bundled model with the same share of heads and neurons gone everywhere: loss and speed-ups."""
    source, output = resolve(BUNDLED).path, scratch / "uniform"
    options: dict[str, Any] = {"dtype": "float32", "eval_text": "none", "calibration": "pydoc", "samples": 128, "seqlen": 512}
    llmprune.prune(str(source), output=output, overwrite=True, heads=share, neurons=share, **options)
    models = [llmprune.load(folder, device="cpu", dtype="float32") for folder in (source, output)]
    row: Row = {"share": share, "loss": loss_of(output)}
    for phase in phases:
        use = Use.of(PruneConfig(model=BUNDLED, target_speedup="2x", for_=phase), models[0].config)
        with torch.no_grad():
            dense, smaller = compared(models, use, CPU, SECONDS)
        row[phase] = dense / smaller
    return row


def loss_at(speed: float, phase: str, rows: Sequence[Row]) -> float | None:
    """Of uniform cuts of that speed-up, between the two nearest; None where none is as fast."""
    known = sorted([(1.0, 0.0), *((row[phase], row["loss"]) for row in rows)])
    speeds, losses = zip(*known, strict=True)
    if speed > speeds[-1]:
        return None
    return float(np.interp(speed, speeds, np.maximum.accumulate(losses)))


def page(result: dict[str, Any]) -> str:
    return "\n".join(["# Budgets of time", "", "By `scripts/bench_budgets.py`.", "", measured(result)])


def measured(result: dict[str, Any]) -> str:
    """The tables, and how they were measured."""
    lines = [
        f"On {result['device']}, {result['threads']} threads, float32, {result['date']}: speed-ups asked for with",
        "`--target-speedup`, predicted from the measured times of layers, and measured of the whole models, turn about with",
        "the dense ones. Loss: nats a token more on held-out documentation; uniform: that of heads and neurons cut by the same",
        "share everywhere, at the speed that was measured, between the two nearest; share: this loss of that.",
        "",
        "| model | use | asked | predicted | measured | of what was asked | layers | parameters | loss | uniform | share |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        cells = [row["model"], row["use"], f"{row['asked']:g}x", f"{row['predicted']:.2f}x", f"{row['measured']:.2f}x"]
        cells += [f"{row['measured'] / row['asked']:.2f}", f"{row['layers']}", f"{row['parameters']:,}"]
        if "loss" in row:
            other = loss_at(row["measured"], row["phase"], result["uniform"])
            cells += [f"{row['loss']:.4f}", "none is so fast" if other is None else f"{other:.4f}"]
            cells += ["" if other is None else f"{row['loss'] / other:.2f}"]
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    phases = [name for name in ("decode", "prefill") if any(name in row for row in result["uniform"])]
    head = ["heads and neurons gone", "loss", *phases]
    lines += ["", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in result["uniform"]:
        cells = [row["share"], f"{row['loss']:.4f}", *(f"{row[phase]:.2f}x" for phase in phases)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(RANDOM, BUNDLED), default=[RANDOM, BUNDLED])
    parser.add_argument("--asked", nargs="+", type=float, default=[1.25, 1.5, 2.0])
    parser.add_argument("--phases", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    known = json.loads(args.output.read_text()) if args.output.exists() else {"rows": [], "uniform": []}
    machine = {"device": processor_name(CPU), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    result = {"date": date.today().isoformat(), "versions": versions(), **machine, **known}
    done = {(row["model"], row["phase"], row["asked"]) for row in result["rows"]}

    def keep(table: str, row: Row) -> None:
        result[table].append(row)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for cell in ((model, phase, factor) for model in args.models for phase in args.phases for factor in args.asked):
            if cell not in done:
                keep("rows", asked_of(*cell, Path(folder)))
        if BUNDLED in args.models:
            for share in SHARES:
                if share not in {row["share"] for row in result["uniform"]}:
                    keep("uniform", uniform(share, args.phases, Path(folder)))
    args.output.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
