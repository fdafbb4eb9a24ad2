"""Prune the bundled model by every method at 50% and 2:4, and record the held-out perplexities.

    python scripts/demo_table.py [--output eval/results/demo.json]

Prints the table in Markdown. Calibration and evaluation are the command's defaults, of the Python that runs this.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import llmprune
from llmprune import solvers
from llmprune.evaluate.perplexity import excess_loss
from llmprune.report.record import versions

PATTERNS = ("50%", "2:4")


def measure(method: str, sparsity: str) -> dict[str, Any]:
    record = llmprune.prune("llama", sparsity=sparsity, method=method).record
    assert record.dense
    assert record.pruned
    return {
        "method": method,
        "sparsity": sparsity,
        "dense": record.dense.value,
        "perplexity": record.pruned.value,
        "excess_loss": excess_loss(record.dense, record.pruned),
        "seconds": sum(record.seconds[phase] for phase in ("collect", "solve", "advance") if phase in record.seconds),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Perplexity by method x pattern, excess loss in brackets, dense on top."""
    dense = f"{rows[0]['dense']:.2f}"
    lines = [f"| method | {' | '.join(PATTERNS)} |", "|---|---|---|", f"| dense | {dense} | {dense} |"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f"{r['perplexity']:.2f} (+{r['excess_loss']:.3f})" for r in rows if r["method"] == method]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    methods = [name for name in ("magnitude", "wanda", "sparsegpt") if name in solvers.names()]
    rows = [measure(method, sparsity) for method in methods for sparsity in PATTERNS]
    print(markdown(rows))
    if args.output:
        result = {"date": date.today().isoformat(), "versions": versions(), "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
