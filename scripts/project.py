"""Project what pruning large models to 2:4 needs, by the formulas of the preflight: memory, disk, hours.

python scripts/project.py [--output eval/results/projection.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmprune.data.windows import Texts, Windows
from llmprune.job.options import PruneConfig
from llmprune.job.recipes import choose_recipe
from llmprune.models.discover import find_blocks, make_block
from llmprune.runs.preflight import Needs, estimate, size
from llmprune.steps.base import Load
from llmprune.steps.channels.rotating import Rotating

ASSUMPTIONS = """\
What pruning to 2:4 would need, by the formulas of `llmprune/runs/preflight.py`. Nothing here was run: it is a projection,
written by `scripts/project.py`. It assumes 128 calibration windows of 2048 tokens, batches of 8, no evaluation, bf16 on one
GPU whose products reach 500 TFLOP/s in bf16 and 40 in float32 (about half of an H200's data sheet: 989 and 67), hidden states
on the host. Reading and writing the checkpoint comes on top.

"""
SAMPLES, SEQLEN, BATCH = 128, 2048, 8
BF16, FLOAT32 = 500e12, 40e12  # operations a second
SHAPES = {  # Llama 3.1: hidden, intermediate, blocks, heads
    "8B": (4096, 14336, 32, 32),
    "70B": (8192, 28672, 80, 64),
    "405B": (16384, 53248, 126, 128),
}
RECIPES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
    "before, to rotate": {"rotate": True},
}


def project(shape: tuple[int, int, int, int], options: dict[str, Any]) -> Needs:
    """What pruning a Llama of this shape to 2:4 needs, or finding a rotation before that."""
    hidden, intermediate, blocks, heads = shape
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    storage = {name: parameter.dtype for name, parameter in model.named_parameters()}
    found = [make_block(i, name, module, storage) for i, (name, module) in enumerate(find_blocks(model).items())]
    texts = Texts(Windows(torch.zeros(SAMPLES, SEQLEN, dtype=torch.long), "-"), None, ())
    recipe = choose_recipe(PruneConfig.create({"model": "-", "sparsity": "2:4"} | options))
    load = Rotating.load(found, hidden) if recipe.rotate else Load()
    nbytes = sum(p.nbytes for p in model.parameters())
    return estimate(config, found, texts, recipe, dtype=torch.bfloat16, batch=BATCH, checkpoint=nbytes, load=load, pinned=True)


def table() -> str:
    rows = [
        "| Llama 3.1 | method | GPU memory | activations, in host memory or on disk | output on disk | hours |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, shape in SHAPES.items():
        for method, options in RECIPES.items():
            needs = project(shape, options)
            hours = ((needs.forward + needs.statistics) / BF16 + needs.solve / FLOAT32) / 3600
            inside, rest = size(needs.weights + needs.solving), size(needs.activations)
            rows.append(f"| {name} | {method} | {inside} | {rest} | {size(needs.output)} | {hours:.2f} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    text = ASSUMPTIONS + table()
    print(text, end="")
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
