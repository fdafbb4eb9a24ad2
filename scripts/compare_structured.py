"""Remove heads, neurons and layers by every score, with and without fitting again; record perplexity and excess loss.

    python scripts/compare_structured.py [--model llama] --output eval/results/structured.json

Calibration is 128 windows of the documentation's calibration split, evaluation the first windows of its evaluation split,
which neither training nor calibration saw; all cells share both. Cells that the output file already has are kept, so that
the command can be stopped and run again. Beside the file: the table in Markdown (.md), which is also printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import llmprune
from llmprune.job.options import LAYER_SCORES
from llmprune.job.record import excess_loss, versions
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import resolve
from llmprune.runs.compare_texts import dense_perplexity, evaluation
from llmprune.steps.structured.scores import SCORES

AMOUNTS = {"neurons": ("12.5%", "25%", "50%"), "heads": ("12.5%", "25%", "50%"), "layers": ("1", "2")}
BUDGETS = ("90%", "75%")
FITS: dict[str, dict[str, Any]] = {
    "corrected": {"target": "corrected"},
    "corrected, by layer": {"target": "corrected", "per_layer": True},
    "dense": {"target": "dense"},
    "none": {"refit": False},
}


def cells() -> list[tuple[str, str, str, str]]:
    """What is removed, how much, by which score, and how what is left is fitted again."""
    found = [
        (what, amount, score, fit)
        for what in ("neurons", "heads")
        for amount in AMOUNTS[what]
        for score in SCORES.names()
        for fit in (FITS if score == "second_order" else ("corrected", "none"))
    ]
    found += [("target_params", amount, "second_order", fit) for amount in BUDGETS for fit in list(FITS)[:2]]
    return found + [("layers", amount, score, "-") for amount in AMOUNTS["layers"] for score in LAYER_SCORES]


def measure(name: str, what: str, amount: str, score: str, fit: str, windows: int) -> dict[str, Any]:
    folder = resolve(name).path
    options: dict[str, Any] = {what: amount, "calibration": "pydoc", "eval_text": "none", "seqlen": 512, **FITS.get(fit, {})}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        options["dtype"] = "float32"
        options["layer_score" if what == "layers" else "score"] = score
        record = llmprune.prune(str(name), output=output, **options).record
        smaller = llmprune.load(output, device="cpu", dtype="float32")
        found, dense = perplexity(smaller, evaluation(folder, windows)[1]), dense_perplexity(folder, windows)
    return {
        "model": Path(name).name,
        "removed": what,
        "amount": amount,
        "score": score,
        "fit": fit,
        "dense": dense.value,
        "perplexity": found.value,
        "excess_loss": excess_loss(dense, found),
        "seconds": record.pruning_seconds(),
        "after": record.structure["after"],
        "before": record.structure["before"],
        "windows": [found.windows, found.length],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Excess loss, and the parameters that are left; one line a score and fit."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        columns = list(dict.fromkeys((row["removed"], row["amount"]) for row in own if row["removed"] != "layers"))
        left = {(r["removed"], r["amount"]): r["after"]["parameters"] / r["before"]["parameters"] for r in own}
        lines += [f"`{model}`, dense perplexity {own[0]['dense']:.2f}; excess loss in nats a token:", ""]
        lines += ["| score | fitted again | " + " | ".join(f"{what} {amount}" for what, amount in columns) + " |"]
        lines += ["|---|---|" + "---:|" * len(columns)]
        lines += ["| parameters left | | " + " | ".join(f"{left[column]:.1%}" for column in columns) + " |"]
        for score, fit in dict.fromkeys((row["score"], row["fit"]) for row in own if row["removed"] != "layers"):
            found = {(r["removed"], r["amount"]): r["excess_loss"] for r in own if (r["score"], r["fit"]) == (score, fit)}
            values = " | ".join(f"{found[column]:.4f}" if column in found else "" for column in columns)
            lines.append(f"| {score} | {fit} | {values} |")
        lines.append("")
        for row in own:
            if row["removed"] == "layers":
                share = row["after"]["parameters"] / row["before"]["parameters"]
                which = f"--layers {row['amount']}, by {row['score']}"
                lines += [f"{which}: {row['excess_loss']:.4f}, {share:.1%} of the parameters.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--windows", type=int, default=100, help="evaluation windows (default: %(default)s)")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th cell from the I-th")
    parser.add_argument("--scores", nargs="+", default=[*SCORES.names(), *LAYER_SCORES], help="only these (default: all)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result = json.loads(args.output.read_text()) if args.output.exists() else {"rows": []}
    known = {(r["model"], r["removed"], r["amount"], r["score"], r["fit"]) for r in result["rows"]}
    wanted = [cell for cell in cells() if cell[2] in args.scores]
    for cell in wanted[args.part[0] :: args.part[1]]:
        if (Path(args.model).name, *cell) in known:
            continue
        try:
            row = measure(args.model, *cell, args.windows)
        except llmprune.InputError as impossible:
            print(f"{' '.join(cell):<40} left out: {impossible}", flush=True)
            continue
        print(f"{' '.join(cell):<40} {row['excess_loss']:.4f}  {row['seconds']:.0f} s", flush=True)
        result["rows"].append(row)
        result |= {"date": date.today().isoformat(), "versions": versions()}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    order = {cell: i for i, cell in enumerate(cells())}
    result["rows"].sort(key=lambda r: order[r["removed"], r["amount"], r["score"], r["fit"]])
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(result["rows"]))
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
