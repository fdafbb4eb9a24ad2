"""Measure what removing heads and neurons does to speed: prefill and decode tokens a second, dense against smaller.

    python scripts/bench_structured.py [--output eval/results/bench_structured.json]

A random Llama of about 100M parameters, and the model that llmprune makes of it at 25% and 50% fewer heads and neurons, turn
about in one process; ratios are medians over the turns. The ideal is the ratio of the blocks' multiplications.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from llmprune.job.record import versions
from llmprune.models.discover import find_blocks
from llmprune.models.heads import Heads
from llmprune.steps.structured.configs import smaller_config

HEADS, NEURONS, WIDTH = 12, 2048, 64
PREFILL, DECODE = 512, 32


def dense_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=16000,
        hidden_size=HEADS * WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=12,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
    )


def smaller(share: float) -> PretrainedConfig:
    heads, neurons = round(HEADS * (1 - share)), round(NEURONS * (1 - share))
    return smaller_config(dense_config(), neurons=(NEURONS, neurons), heads=Heads(heads, heads, WIDTH), layers=None)


def build(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def macs(model: PreTrainedModel) -> int:
    """Multiplications a token in the blocks' matrices."""
    return sum(p.numel() for block in find_blocks(model).values() for p in block.parameters() if p.ndim == 2)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1, use_cache=False)
    return ids.numel() / (time.perf_counter() - start)


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    model.generate(ids[:, :4], max_new_tokens=DECODE, min_new_tokens=DECODE, do_sample=False)
    return DECODE / (time.perf_counter() - start)


def bench(turns: int) -> list[dict[str, Any]]:
    """Tokens a second of each, and how many times the dense model's."""
    models = {share: build(dense_config() if not share else smaller(share)) for share in (0.0, 0.25, 0.5)}
    ids = torch.randint(16000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    found: dict[tuple[str, float], list[float]] = {}
    for turn, (share, model) in itertools.product(range(turns + 1), models.items()):
        for what, measure in (("prefill", prefill), ("decode", decode)):
            speed = measure(model, ids)
            if turn:  # the first warms up
                found.setdefault((what, share), []).append(speed)
    rows = []
    for share, model in models.items():
        row: dict[str, Any] = {"removed": share, "parameters": model.num_parameters(), "class": type(model).__name__}
        row["ideal"] = macs(models[0.0]) / macs(model)
        for what in ("prefill", "decode"):
            own, dense = found[what, share], found[what, 0.0]
            row[what] = {"tokens_a_second": median(own), "times_dense": median(a / b for a, b in zip(own, dense, strict=True))}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = bench(args.turns)
    for row in rows:
        speeds = ", ".join(
            f"{what} {row[what]['tokens_a_second']:.0f} tokens/s ({row[what]['times_dense']:.2f}x)"
            for what in ("prefill", "decode")
        )
        share = f"{row['prefill']['times_dense'] / row['ideal']:.0%} of the ideal {row['ideal']:.2f}x in prefill"
        print(f"{row['removed']:.0%} removed, {row['parameters']:,} parameters: {speeds}; {share}")
    if args.output:
        machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
        head = {"date": date.today().isoformat(), "machine": machine, "versions": versions()}
        args.output.write_text(json.dumps(head | {"prefill": PREFILL, "decode": DECODE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
