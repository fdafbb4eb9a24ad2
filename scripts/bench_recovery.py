"""What training after pruning gains: the bundled model pruned so or so, then trained.

    python scripts/bench_recovery.py --output eval/results/recovery.json --text FILE [--tokens 300K] [--only 2:4]

Losses are nats a token more than the dense model on held-out documentation, and KL from the dense model on another text, before
and after, all in float32. Rows that the output file has are kept. Beside it: the table in Markdown (.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from compare_allocation import divergence

import llmprune
from llmprune.base.hardware import processor_name
from llmprune.job.record import excess_loss, versions
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import resolve
from llmprune.runs.compare import dense_perplexity, evaluation, load_float32

WINDOWS, LENGTH, SAMPLES = 100, 512, 128
Row = dict[str, Any]
# how it is pruned, and how it is trained: the first of each is what the others are compared with
STARTS: dict[str, dict[str, Any]] = {
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda": {"method": "wanda"},
    "magnitude": {"method": "magnitude"},
}
TRAININGS: dict[str, dict[str, Any]] = {
    "kept, kd": {},
    "lora, kd": {"train": "lora"},
    "kept, ce": {"loss": "ce"},
    "small, kd": {"train": "small"},
}
CELLS: list[tuple[str, str, str]] = [
    *(("balanced", "2:4", training) for training in TRAININGS),
    *((start, "2:4", "kept, kd") for start in ("magnitude", "wanda", "sparsegpt", "best")),
    *(("balanced", pattern, "kept, kd") for pattern in ("70%", "50%", "25% neurons", "50% neurons")),
    ("best", "70%", "kept, kd"),
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
        some: Row = {"calibration": "pydoc", "samples": SAMPLES, "seqlen": LENGTH, "eval_text": "none", "dtype": "float32"}
        llmprune.prune("llama", output=output, **some, **how)
    return output


def measure(name: str, pattern: str, training: str, tokens: str, rate: float | None, text: str, folder: Path) -> Row:
    source, output = start(name, pattern, folder), folder / "trained"
    before = lost(source, text)
    options = {**TRAININGS[training], "tokens": tokens, "rate": rate, "eval_text": "none", "overwrite": True}
    told = llmprune.recover(source, output, **options).record.recoveries[-1]
    after = lost(output, text)
    return {
        **{"start": name, "pattern": pattern, "training": training, "tokens": told["tokens"], "rate": told["rate"]},
        **{"loss_before": before[0], "loss_after": after[0], "kl_before": before[1], "kl_after": after[1]},
        **{"best": told["best"], "steps": told["steps"], "seconds": told["seconds"], "held_out": told["held_out"]},
        "date": date.today().isoformat(),
    }


def measured(result: Row) -> str:
    """The table, and how it was measured."""
    lines = [
        f"Bundled model, {SAMPLES} calibration windows of {LENGTH} tokens, then trained on its own training part of `pydoc`,",
        f"{result['threads']} threads of {result['device']}; one seed. Loss: nats a token more than the dense model on",
        f"{WINDOWS} windows of held-out text; KL: from the dense model on another text ({result['text']}); in float32.",
        "",
        "| pruned by | to | trained | tokens | rate | loss before | after | share | KL before | after | share | seconds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        shares = [row[f"{what}_after"] / row[f"{what}_before"] for what in ("loss", "kl")]
        cells = [row["start"] if "neurons" not in row["pattern"] else "second order", row["pattern"], row["training"]]
        cells += [f"{row['tokens']:,}", f"{row['rate']:g}", f"{row['loss_before']:.4f}", f"{row['loss_after']:.4f}"]
        cells += [f"{shares[0]:.2f}", f"{row['kl_before']:.4f}", f"{row['kl_after']:.4f}", f"{shares[1]:.2f}"]
        lines.append(f"| {' | '.join([*cells, format(row['seconds'], '.0f')])} |")
    return "\n".join([*lines, ""])


def page(result: Row) -> str:
    return "\n".join(["# What training after pruning gains", "", "By `scripts/bench_recovery.py`.", "", measured(result)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a file to measure KL on")
    parser.add_argument("--tokens", default="300K")
    parser.add_argument("--rate", type=float, help="of all trainings (default: recover's own)")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--only", nargs="+", help="patterns (default: all)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    known = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    machine = {"device": processor_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    result = {"versions": versions(), **machine, "text": Path(args.text).name, "tokens": args.tokens, "rows": known["rows"]}
    done = {(row["start"], row["pattern"], row["training"]) for row in result["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        for cell in CELLS:
            if cell in done or cell[0] not in args.starts or (args.only and cell[1] not in args.only):
                continue
            result["rows"].append(measure(*cell, args.tokens, args.rate, args.text, Path(folder)))
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            row = result["rows"][-1]
            print(*cell, *(f"{row[name]:.4f}" for name in ("loss_before", "loss_after", "kl_before", "kl_after")), flush=True)
    args.output.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
