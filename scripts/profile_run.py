"""Where the seconds of the main job go, and the least that they could be; writes JSON, of which docs/profile.md is made.

    python scripts/profile_run.py --output eval/results/profile.json --before CHECKOUT [--repeats 3]

runs:    `llmprune --model llama --sparsity 2:4` by this checkout and by another, turn about, each a process of its own, with
         all threads and with one: wall seconds, seconds by phase, peak memory; medians.
batches: the same without evaluation, by windows run at once.
bound:   the operations of each phase, counted by torch's own counter on the bundled model, and the rate at which this machine
         multiplies matrices of the model's shapes.
bytes:   what the operations of a block read and write, and what its products and attention alone do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llmprune.base.hardware import dtype_name, pick_device
from llmprune.base.words import size
from llmprune.data.windows import evaluation_windows
from llmprune.job.record import versions
from llmprune.models.attention import fast_attention
from llmprune.models.discover import find_blocks
from llmprune.models.resolve import resolve
from llmprune.models.skeleton import load_config, load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
MODEL, DTYPES = "llama", (torch.float32, torch.bfloat16)
BATCHES = (1, 2, 4, 8, 16, 32)
STAGES = ("q_proj", "o_proj", "gate_proj", "down_proj")  # the first matrix of each stage of a Llama block
LENGTH, ROWS = 512, 4096  # tokens of a window and of a batch


def run(checkout: Path, threads: int, *options: str) -> dict[str, Any]:
    """One run of the main job by the package in `checkout`."""
    env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "llmprune", "--model", MODEL, "--sparsity", "2:4", "--quiet", "--output", "out", *options]
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=scratch, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        record = json.loads((Path(scratch) / "out" / "llmprune.json").read_text())
    found = {"wall_seconds": wall, "seconds": record["seconds"], "peak_memory_bytes": record["peak_memory"]["process"]}
    if record["dense"]:
        found["perplexity"] = {name: record[name]["value"] for name in ("dense", "pruned")}
    return found | {"dtype": record["compute"]["dtype"]}


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each number, over several runs; what is no number is the last run's."""
    last = runs[-1]
    return {
        name: medians([one[name] for one in runs])
        if isinstance(value, dict)
        else statistics.median(one[name] for one in runs)
        if isinstance(value, (int, float))
        else value
        for name, value in last.items()
    }


def turn_about(before: Path | None, repeats: int) -> Iterator[dict[str, Any]]:
    """This checkout in both dtypes and, if named, the other, once each and again."""
    kinds = {"now": (ROOT, ()), "now, float32": (ROOT, ("--dtype", "float32"))}
    if before:
        kinds = {"before": (before, ()), **kinds}
    for threads in sorted({1, torch.get_num_threads()}, reverse=True):
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for name in [*kinds] * repeats:
            checkout, options = kinds[name]
            runs[name].append(run(checkout, threads, *options))
            print(threads, name, json.dumps(runs[name][-1]), flush=True)
        for name, found in runs.items():
            yield {"what": name, "threads": threads, "walls": [one["wall_seconds"] for one in found], **medians(found)}


def by_batch(repeats: int) -> Iterator[dict[str, Any]]:
    """Without evaluation, by dtype and windows run at once."""
    cases = [(dtype_name(dtype), windows) for dtype in DTYPES for windows in BATCHES]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for dtype, windows in cases * repeats:
        options = ("--dtype", dtype, "--batch-size", str(windows), "--eval-text", "none")
        runs[dtype, windows].append(run(ROOT, torch.get_num_threads(), *options))
    for (_, windows), found in runs.items():
        yield {"windows": windows, **medians(found)}


def matrices(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Of the blocks, by name."""
    blocks = find_blocks(model).values()
    found = [(name, one) for block in blocks for name, one in block.named_modules() if isinstance(one, nn.Linear)]
    return {f"{number} {name}": one for number, (name, one) in enumerate(found)}


def evaluation_tokens(folder: Path) -> int:
    """Of the text that the main job measures perplexity on."""
    return evaluation_windows("pydoc", load_tokenizer(folder), seqlen=LENGTH).ids.numel()


def operations(model: PreTrainedModel) -> dict[str, float]:
    """Per token: of the blocks, of the head, and of one product of a stage's inputs with themselves, summed over stages."""
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    with torch.no_grad(), fast_attention(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    head = 2 * model.config.hidden_size * model.config.vocab_size
    stages = [one.in_features for name, one in matrices(model).items() if name.endswith(STAGES)]
    gram = 2 * sum(width**2 for width in stages)
    return {"blocks": counter.get_total_flops() / LENGTH - head, "head": head, "gram": gram}


def rates(model: PreTrainedModel) -> dict[str, float]:
    """Operations a second in products of the model's matrices with a batch, by dtype: each the best of twenty, all together."""
    found = {}
    for dtype in DTYPES:
        total, seconds = 0, 0.0
        for one in matrices(model).values():
            x, w = torch.randn(ROWS, one.in_features).to(dtype), one.weight.to(dtype)
            times = []
            for _ in range(20):
                start = time.perf_counter()
                x @ w.T
                times.append(time.perf_counter() - start)
            total, seconds = total + 2 * ROWS * one.weight.numel(), seconds + min(times)
        found[dtype_name(dtype)] = total / seconds
    return found


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, views left out: of all, and of products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            nbytes = sum(leaf.nbytes for leaf in leaves)
            self.all += nbytes
            if any(name in str(func) for name in ("mm", "linear", "attention")):
                self.products += nbytes
        return out


def traffic(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, float]:
    """A block's bytes a token, for a batch, in hidden states: how many times the block could read or write its input."""
    ids, blocks = torch.zeros(ROWS // LENGTH, LENGTH, dtype=torch.long), list(find_blocks(model).values())
    count = Traffic()
    handles = [
        blocks[1].register_forward_pre_hook(lambda *_: count.__enter__() and None),
        blocks[1].register_forward_hook(lambda *_: count.__exit__(None, None, None)),
    ]
    with torch.no_grad(), fast_attention():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden = ROWS * model.config.hidden_size * dtype.itemsize
    return {"all": count.all / hidden, "products": count.products / hidden}


def runs_table(result: dict[str, Any]) -> str:
    """Seconds by phase and peak memory, a row a checkout, dtype and number of threads."""
    phases = ("prepare", "evaluate", "forward", "statistics", "solve")
    lines = [
        f"| run | threads | seconds | {' | '.join(phases)} | peak memory | loss |",
        f"|---|---:|{'---:|' * (len(phases) + 3)}",
    ]
    for row in result["runs"]:
        loss = math.log(row["perplexity"]["pruned"] / row["perplexity"]["dense"])
        name = row["what"] if row["what"] != "before" else f"before ({result['before']})"
        seconds = [f"{row['wall_seconds']:.1f}", *(f"{row['seconds'][phase]:.1f}" for phase in phases)]
        shown = [f"{name.removesuffix(', float32')}, {row['dtype']}", str(row["threads"]), *seconds]
        lines.append(f"| {' | '.join([*shown, size(int(row['peak_memory_bytes'])), f'{loss:.4f}'])} |")
    return "\n".join(["", *lines, ""])


def bound_table(result: dict[str, Any]) -> str:
    """What each phase must multiply, how long that takes at the rate of products, and how long the phase takes."""
    own, count = result["operations"], result["tokens"]
    needed = {
        "evaluate": 2 * count["evaluation"] * (own["blocks"] + own["head"]),
        "forward": 2 * count["calibration"] * own["blocks"],
        "statistics": 2 * count["calibration"] * own["gram"],
    }
    rows = {row["dtype"]: row for row in result["runs"] if row["what"] != "before" and row["threads"] == result["threads"]}
    lines = [
        f"| phase | operations | {' | '.join(f'{dtype}: least | measured' for dtype in rows)} |",
        f"|---|---:|{'---:|---:|' * len(rows)}",
    ]
    for phase, operations in needed.items():
        pairs = [f"{operations / result['rates'][dtype]:.1f} s | {row['seconds'][phase]:.1f} s" for dtype, row in rows.items()]
        lines.append(f"| {phase} | {operations / 1e12:.2f} T | {' | '.join(pairs)} |")
    rates = " and ".join(f"{rate / 1e9:.0f} G in {dtype}" for dtype, rate in result["rates"].items())
    how = f"Products of the model's matrices with {ROWS} tokens, {result['threads']} threads: {rates} a second."
    return "\n".join(["", *lines, "", how, ""])


def batches_table(result: dict[str, Any]) -> str:
    """Seconds of forward passes and statistics, by windows run at once."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["batches"]))
    lines = [f"| windows of {LENGTH} | {' | '.join(dtypes)} |", f"|---:|{'---:|' * len(dtypes)}"]
    for windows in BATCHES:
        found = [row for row in result["batches"] if row["windows"] == windows]
        own = {row["dtype"]: row["seconds"]["forward"] + row["seconds"]["statistics"] for row in found}
        lines.append(f"| {windows} | {' | '.join(f'{own[d]:.1f} s' for d in dtypes)} |")
    return "\n".join(["", *lines, ""])


def bytes_text(result: dict[str, Any]) -> str:
    """How much a block's operations move, in words."""
    moved = [
        f"{own['all']:.0f} times in {dtype}, of which {own['products']:.0f} are those of its products and attention"
        for dtype, own in result["traffic"].items()
    ]
    return f"A block reads and writes as much as its hidden states {', and '.join(moved)}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout to run turn about")
    parser.add_argument("--before-name", default="", help="what to call it, such as its commit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    folder = resolve(MODEL).path
    config, device = load_config(folder), pick_device("cpu")
    models = {dtype: load_model(folder, config, device, dtype) for dtype in DTYPES}
    result = {
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": versions(),
        "before": args.before_name,
        "tokens": {"calibration": 128 * LENGTH, "evaluation": evaluation_tokens(folder)},
        "operations": operations(models[torch.bfloat16]),
        "rates": rates(models[torch.float32]),
        "traffic": {dtype_name(dtype): traffic(model, dtype) for dtype, model in models.items()},
        "runs": list(turn_about(args.before, args.repeats)),
        "batches": list(by_batch(args.repeats)),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
