"""Measure what streaming a checkpoint of some 3 GB needs: peak memory, and whether time a block stays flat.

    python scripts/bench_memory.py [--blocks 40] [--hidden 2048] [--output eval/results/bench_memory.json]

A random bf16 Llama, one shard a block, is pruned by Wanda to 2:4 in a process of its own, in float32 on the CPU. Memory is
the peak resident set beyond that of a process that has only imported llmprune.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_prune import synthetic_llama

from llmprune.base.hardware import peak_memory
from llmprune.job.progress import Progress
from llmprune.job.record import versions

SAMPLES, SEQLEN = 8, 512


class Stopwatch(Progress):
    """The time at which each block was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self, blocks: int, sites: int) -> None:
        self.times = [time.perf_counter()]

    def block(self, index: int) -> None:
        self.times.append(time.perf_counter())


def prune(source: Path, output: Path) -> dict[str, Any]:
    """In this process."""
    import llmprune.runs.prune

    loaded = peak_memory()
    watch = Stopwatch()
    options: dict[str, Any] = {"calibration": "pydoc", "samples": SAMPLES, "seqlen": SEQLEN, "method": "wanda"}
    options["dtype"] = "float32"
    record = llmprune.prune(source, output=output, sparsity="2:4", progress=watch, **options).record
    return {
        "loaded_bytes": loaded,
        "peak_bytes": record.peak_memory["process"],
        "checkpoint_bytes": record.size["bytes_before"],
        "seconds_by_block": [b - a for a, b in itertools.pairwise(watch.times)],
        "seconds": record.seconds,
    }


def bench(blocks: int, hidden: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "source", Path(scratch) / "out"
        source.mkdir()
        synthetic_llama(source, blocks, hidden, 2 * hidden)
        command = [sys.executable, __file__, "--prune", str(source), str(output)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.splitlines()[-1])


def show(result: dict[str, Any]) -> None:
    size, loaded, peak = (result[name] / 2**20 for name in ("checkpoint_bytes", "loaded_bytes", "peak_bytes"))
    print(
        f"checkpoint {size:,.0f} MiB; peak {peak:,.0f} MiB, {peak - loaded:,.0f} MiB beyond {loaded:,.0f} with llmprune loaded"
    )
    each = result["seconds_by_block"]
    tenth = max(len(each) // 10, 1)
    first, last = median(each[:tenth]), median(each[-tenth:])
    print(f"seconds a block: median {median(each):.2f}, first tenth {first:.2f}, last tenth {last:.2f} ({last / first:.2f}x)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--prune", nargs=2, type=Path, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prune:
        print(json.dumps(prune(*args.prune)))
        return
    result = {
        "date": date.today().isoformat(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "calibration": {"samples": SAMPLES, "seqlen": SEQLEN},
        "blocks": args.blocks,
        "hidden": args.hidden,
        **bench(args.blocks, args.hidden),
    }
    show(result)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
