"""Measure the main job and the memory of streaming; print a table and write JSON.

    python scripts/bench_prune.py [job] [memory] [processes] [--output eval/results/bench_prune.json]

Parts that the output file has and that are not asked for stay as they are; each says when and where it was measured, and how
busy the machine was before it.

job:     `llmprune --model llama --sparsity 2:4` as a process of its own: what it prints, wall seconds of the whole process,
         seconds by phase, peak memory. The documentation's quick start is written from it.
memory:  a synthetic checkpoint of 8 blocks and one of 32, turn about, each time pruned by SparseGPT in a process of its
         own: peak resident memory, median of three.
processes: a synthetic checkpoint of 2 blocks pruned by `fast` to 2:4 in one process and in two, one thread each, turn about:
         seconds of running and counting (collect) and of solving, median of three.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from llmprune.base.files import INDEX
from llmprune.base.words import count
from llmprune.job.record import versions
from llmprune.models.resolve import BUNDLED


def run_command(
    *arguments: str, launcher: Sequence[str] = (), threads: int | None = None, keep: Path | None = None
) -> dict[str, Any]:
    """Run llmprune in a process of its own, in an empty folder; returns its record, the wall seconds of the whole process and
    what it printed. `keep` is where the folder that it wrote is copied.
    """
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, *launcher, "-m", "llmprune", *arguments]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env, cwd=scratch)
        wall = time.perf_counter() - start
        (record,) = Path(scratch).glob("*/llmprune.json")
        if keep:
            shutil.copytree(record.parent, keep)
        return {"wall_seconds": wall, "printed": done.stdout, **json.loads(record.read_text())}


def bench_job(keep: Path | None = None) -> dict[str, Any]:
    record = run_command("--model", "llama", "--sparsity", "2:4", keep=keep)
    return {
        "printed": record["printed"],
        "wall_seconds": record["wall_seconds"],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory"]["process"],
        "perplexity": {"dense": record["dense"]["value"], "pruned": record["pruned"]["value"]},
    }


def synthetic_llama(folder: Path, blocks: int, hidden: int = 1024, intermediate: int = 2816) -> None:
    """Write a random bf16 Llama checkpoint, one shard a block, with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    generator = torch.Generator().manual_seed(0)
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        weights = {prefix + n + ".weight": random_bf16(shape, generator) for n, shape in matrices.items()}
        gains = {prefix + n + ".weight": torch.ones(hidden, dtype=torch.bfloat16) for n in norms}
        write(f"model-{block:05d}.safetensors", weights | gains)
    embeddings = {"model.embed_tokens.weight": random_bf16((config.vocab_size, hidden), generator)}
    write("model-outside.safetensors", embeddings | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def random_bf16(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (0.02 * torch.randn(*shape, generator=generator)).to(torch.bfloat16)


def bench_memory(depths: tuple[int, ...] = (8, 32), repeats: int = 3) -> dict[str, Any]:
    settings = ["--method", "sparsegpt", "--calibration", "pydoc", "--samples", "8", "--seqlen", "256"]
    runs: dict[int, list[dict[str, Any]]] = {blocks: [] for blocks in depths}
    with tempfile.TemporaryDirectory() as scratch:
        for blocks in depths:
            (Path(scratch) / str(blocks)).mkdir()
            synthetic_llama(Path(scratch) / str(blocks), blocks)
        for blocks in depths * repeats:
            runs[blocks].append(run_command("--model", f"{scratch}/{blocks}", "--sparsity", "2:4", *settings))
    peaks = {blocks: [record["peak_memory"]["process"] for record in runs[blocks]] for blocks in depths}
    rows = [
        {
            "blocks": blocks,
            "checkpoint_bytes": runs[blocks][0]["size"]["bytes_before"],
            "peak_memory_bytes": statistics.median(peaks[blocks]),
            "peaks_bytes": peaks[blocks],
        }
        for blocks in depths
    ]
    return {"rows": rows}


def bench_processes(sizes: tuple[int, ...] = (1, 2), repeats: int = 3) -> dict[str, Any]:
    settings = ["--quality", "fast", "--calibration", "pydoc", "--samples", "16", "--seqlen", "512"]
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as scratch:
        synthetic_llama(Path(scratch), 2)
        for size in sizes * repeats:
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
            arguments = ["--model", scratch, "--sparsity", "2:4", *settings]
            runs[size].append(run_command(*arguments, launcher=launcher, threads=1)["seconds"])
    rows = [
        {
            "processes": size,
            "collect_seconds": statistics.median(run["forward"] + run["statistics"] for run in runs[size]),
            "solve_seconds": statistics.median(run["solve"] for run in runs[size]),
        }
        for size in sizes
    ]
    return {"rows": rows}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"job": bench_job, "memory": bench_memory, "processes": bench_processes}


def measure(part: str, **options: Any) -> dict[str, Any]:
    """What a part measures, after when and where."""
    return {
        "date": date.today().isoformat(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]},
        "versions": versions(),
        **PARTS[part](**options),
    }


def show(results: dict[str, Any]) -> None:
    if job := results.get("job"):
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in job["seconds"].items())
        print(f"main job: {job['wall_seconds']:.1f} s ({phases}), peak {job['peak_memory_bytes'] / 2**20:.0f} MiB")
    for row in results.get("memory", {}).get("rows", []):
        size, peak = row["checkpoint_bytes"] / 2**20, row["peak_memory_bytes"] / 2**20
        each = ", ".join(f"{peak / 2**20:.0f}" for peak in row["peaks_bytes"])
        print(f"streaming {count(row['blocks'], 'block')} ({size:.0f} MiB): peak {peak:.0f} MiB, median of {each}")
    for row in results.get("processes", {}).get("rows", []):
        print(
            f"{count(row['processes'], 'process')}: collect {row['collect_seconds']:.1f} s, solve {row['solve_seconds']:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="what to measure (default: all)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to put the folder that the main job writes")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    known = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    results = known | {part: measure(part, **({"keep": args.keep} if part == "job" else {})) for part in parts}
    show(results)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
