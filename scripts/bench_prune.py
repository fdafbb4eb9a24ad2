"""Measure the main job, the SparseGPT sweep and the memory of streaming; print a table and write JSON.

    python scripts/bench_prune.py [job] [solver] [memory] [--output eval/results/NAME.json]

job:     `llmprune --model llama --sparsity 2:4` as a process of its own: wall seconds, seconds by phase, peak memory.
solver:  our sweep against a plain column-at-a-time twin, turn about in one process: seconds, ratio, difference.
memory:  a synthetic checkpoint of 8 blocks and one of 32, each pruned in a process of its own: peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from llmprune.models.checkpoint import INDEX
from llmprune.models.resolve import BUNDLED
from llmprune.patterns import Pattern, parse
from llmprune.report.record import versions
from llmprune.solvers import sparsegpt
from llmprune.stats import Gram


def run_command(*arguments: str) -> dict[str, Any]:
    """Run llmprune in a process of its own; returns its record and the wall seconds of the whole process."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "llmprune.cli", *arguments, "--output", str(output)], check=True, stdout=subprocess.DEVNULL
        )
        wall = time.perf_counter() - start
        return {"wall_seconds": wall, **json.loads((output / "llmprune.json").read_text())}


def bench_job() -> dict[str, Any]:
    record = run_command("--model", "llama", "--sparsity", "2:4")
    return {
        "wall_seconds": record["wall_seconds"],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory"]["process"],
        "perplexity": {"dense": record["dense"]["value"], "pruned": record["pruned"]["value"]},
    }


def plain_sparsegpt(w: Tensor, gram: Gram, pattern: Pattern) -> Tensor:
    """The textbook sweep: after each column, correct all later ones."""
    upper, w = gram.factor.upper, w.clone()
    rows, columns = w.shape
    mask = torch.ones_like(w, dtype=torch.bool)
    step = sparsegpt.BLOCK if pattern.period == 1 else pattern.period
    for j in range(columns):
        if j % step == 0:
            score = (w[:, j : j + step] / upper.diagonal()[j : j + step]).square()
            mask[:, j : j + step] = pattern.keep(score, start=j * rows)
        error = w[:, j].masked_fill(mask[:, j], 0) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return w.masked_fill(~mask, 0)


def bench_solver(size: int, sparsity: str, repeats: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator) / size**0.5 + 0.3 * torch.eye(size)
    x = torch.randn(2 * size, size, generator=generator) @ mix
    w, pattern, gram = torch.randn(size, size, generator=generator), parse(sparsity), Gram(size, torch.device("cpu"))
    gram.add(x)
    _ = gram.factor  # shared by both, and by all matrices that read the same input
    ours, plain = [], []
    for _ in range(repeats):
        seconds, fast = timed(lambda: sparsegpt.solve(w, gram, pattern).weight)
        ours.append(seconds)
        seconds, slow = timed(lambda: plain_sparsegpt(w, gram, pattern))
        plain.append(seconds)
    loss_fast, loss_slow = (float((x @ (w - p).T).square().sum(dtype=torch.float64)) for p in (fast, slow))
    return {
        "size": size,
        "pattern": sparsity,
        "ours_seconds": statistics.median(ours),
        "plain_seconds": statistics.median(plain),
        "ratio": statistics.median(b / a for a, b in zip(ours, plain, strict=True)),
        "masks_equal": float(((fast != 0) == (slow != 0)).float().mean()),
        "output_error_ratio": loss_fast / loss_slow,
    }


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


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


def bench_memory(blocks: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "source"
        folder.mkdir()
        synthetic_llama(folder, blocks)
        settings = ["--calibration", "pydoc", "--samples", "8", "--seqlen", "256"]
        record = run_command("--model", str(folder), "--sparsity", "2:4", *settings)
    return {
        "blocks": blocks,
        "checkpoint_bytes": record["size"]["bytes_before"],
        "peak_memory_bytes": record["peak_memory"]["process"],
        "wall_seconds": record["wall_seconds"],
    }


def show(results: dict[str, Any]) -> None:
    if job := results.get("job"):
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in job["seconds"].items())
        print(f"main job: {job['wall_seconds']:.1f} s ({phases}), peak {job['peak_memory_bytes'] / 2**20:.0f} MiB")
    for row in results.get("solver", []):
        name = f"sparsegpt {row['size']}x{row['size']} {row['pattern']}"
        times = f"{row['ours_seconds']:.3f} s, plain {row['plain_seconds']:.3f} s, {row['ratio']:.1f}x"
        print(f"{name}: {times}; masks equal {row['masks_equal']:.4%}, output error ratio {row['output_error_ratio']:.5f}")
    for row in results.get("memory", []):
        size, peak = row["checkpoint_bytes"] / 2**20, row["peak_memory_bytes"] / 2**20
        print(f"streaming {row['blocks']} blocks ({size:.0f} MiB): peak {peak:.0f} MiB, {row['wall_seconds']:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="job|solver|memory", help="what to measure (default: all)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    parts = set(args.parts) or {"job", "solver", "memory"}
    if unknown := parts - {"job", "solver", "memory"}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose job, solver or memory")
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    if "job" in parts:
        results["job"] = bench_job()
    if "solver" in parts:
        results["solver"] = [bench_solver(size, pattern) for size in (1024, 2048) for pattern in ("2:4", "0.5")]
    if "memory" in parts:
        results["memory"] = [bench_memory(blocks) for blocks in (8, 32)]
    show(results)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
