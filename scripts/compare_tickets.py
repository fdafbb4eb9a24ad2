"""Lottery tickets on a model whose training was kept: as many weights, found and begun in several ways, then trained alike.

    python scripts/compare_tickets.py --model FOLDER --early FOLDER/step-70 --output eval/results/tickets.json

FOLDER is what `scripts/train_demo.py --keep-at 70` makes. A ticket is the mask of the trained model's largest weights, with
the weights of the early checkpoint; beside it a random mask with these weights, and the ticket's mask with the trained ones.
Each is trained to predict the text, on the training part of `pydoc`; seeds decide its order, and the random masks. Losses are
nats a token more than the trained dense model on held-out documentation, in float32. Rows that the output file has are kept.
Beside it: the table in Markdown (.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import Generator

import llmprune
from llmprune import solvers
from llmprune.job.record import excess_loss, versions
from llmprune.measure.perplexity import perplexity
from llmprune.runs.compare_texts import dense_perplexity, evaluation, load_float32
from llmprune.solvers import METHODS

WINDOWS = 100
RANDOM = "random_mask"
Row = dict[str, Any]
# the method that finds the mask, whether the weights are set back, and rates: of those the best by held-out loss counts
WAYS: dict[str, tuple[str, bool, list[float]]] = {
    "ticket": ("magnitude", True, [1e-3, 3e-3]),
    "random mask": (RANDOM, True, [1e-3, 3e-3]),
    "fine-tuned": ("magnitude", False, [3e-4, 1e-3]),
}


def lost(source: Path, folder: Path) -> float:
    return excess_loss(dense_perplexity(source, WINDOWS), perplexity(load_float32(folder), evaluation(source, WINDOWS)[1]))


def measure(way: str, pattern: str, seed: int, args: argparse.Namespace, folder: Path) -> Row:
    method, rewound, rates = WAYS[way]
    if method == RANDOM:
        generator: Generator = vars(METHODS.get(method))["generator"]
        generator.manual_seed(seed)
    pruned = folder / "pruned"
    some: dict[str, Any] = {"calibration": "pydoc", "samples": 2, "seqlen": 64, "eval_text": "none", "dtype": "float32"}
    llmprune.prune(args.model, output=pruned, sparsity=pattern, method=method, overwrite=True, **some)
    how: dict[str, Any] = {"text": "pydoc", "tokens": args.tokens, "loss": "ce", "seed": seed, "eval_text": "none"}
    found: list[tuple[float, float, float, Row]] = []
    for rate in rates:
        rewind = str(args.early) if rewound else None
        result = llmprune.recover(pruned, folder / "trained", rate=rate, rewind=rewind, overwrite=True, **how)
        told = result.record.recoveries[-1]
        found.append((told["loss_after"], rate, lost(args.model, folder / "trained"), told))
    _, rate, loss, told = min(found, key=lambda one: one[0])
    return {
        **{"way": way, "pattern": pattern, "seed": seed, "rate": rate, "tokens": told["tokens"], "best": told["best"]},
        **{"loss_before": lost(args.model, pruned), "loss": loss, "others": {str(one[1]): one[2] for one in found}},
        **{"steps": told["steps"], "seconds": told["seconds"], "date": date.today().isoformat()},
    }


def measured(result: Row) -> str:
    """The table, and how it was measured."""
    rows, cells = result["rows"], []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        for way in WAYS:
            own = [row for row in rows if (row["way"], row["pattern"]) == (way, pattern)]
            losses = [row["loss"] for row in own]
            spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
            rates = ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in own}))
            cells.append(f"| {pattern} | {way} | {len(own)} | {rates} | {mean(losses):.4f}{spread} |" if own else "")
    return "\n".join([
        f"{result['model']}, early weights of {result['early']}, {rows[0]['tokens']:,} tokens of training each. Loss: nats a",
        f"token more than the trained dense model on {WINDOWS} windows of held-out documentation; mean and standard deviation.",
        "", "| sparsity | begun as | seeds | rates chosen | loss |", "|---|---|---:|---|---:|", *filter(None, cells), "",
    ])  # fmt: skip


def page(result: Row) -> str:
    return "\n".join(["# Tickets, random masks, fine-tuning", "", "By `scripts/compare_tickets.py`.", "", measured(result)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--early", type=Path, required=True, help="an earlier checkpoint of it")
    parser.add_argument("--patterns", nargs="+", default=["70%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", default="300K")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    solvers.__path__.append(str(Path(__file__).parent / "solvers"))
    known = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    result = {"versions": versions(), "model": args.model.name, "early": args.early.name, "rows": known}
    done = {(row["way"], row["pattern"], row["seed"]) for row in known}
    cells = [(way, pattern, seed) for pattern in args.patterns for seed in args.seeds for way in WAYS]
    with tempfile.TemporaryDirectory() as folder:
        for way, pattern, seed in (cell for cell in cells if cell not in done):
            result["rows"].append(measure(way, pattern, seed, args, Path(folder)))
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            print(way, pattern, seed, f"{result['rows'][-1]['loss']:.4f}", flush=True)
    args.output.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
