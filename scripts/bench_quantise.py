"""What pruning and rounding do to each matrix's outputs, apart and together.

    python scripts/bench_quantise.py --output eval/results/quantise_layers.json [--patterns 2:4 50%] [--bits 4]

The bundled model is pruned, rounded, and pruned and then rounded, each time from the dense weights. Each matrix's error is that
of its outputs, squared and relative, on the inputs that it has in the dense model over the calibration windows: the same inputs
for all three, so that the errors of the parts can be added.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import llmprune
from llmprune.base.hardware import processor_name
from llmprune.data.windows import calibration_windows
from llmprune.job.record import versions
from llmprune.models.discover import find_blocks
from llmprune.models.resolve import resolve
from llmprune.runs.compare_texts import evaluation, load_float32

SAMPLES, LENGTH = 128, 512
KINDS = ("pruned", "rounded", "both")


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The blocks' linear layers by name."""
    return {
        f"{block}.{name}": module
        for block, own in find_blocks(model).items()
        for name, module in own.named_modules()
        if isinstance(module, nn.Linear)
    }


@torch.no_grad()
def grams(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Of each linear layer the sum over its inputs of x x^T."""
    found = {name: torch.zeros(own.in_features, own.in_features) for name, own in linears(model).items()}

    def add(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            found[name].addmm_(x.T, x)

        return hook

    hooks = [own.register_forward_pre_hook(add(name)) for name, own in linears(model).items()]
    for batch in ids.split(8):
        model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def errors(dense: dict[str, nn.Linear], folder: Path, gram: dict[str, Tensor]) -> dict[str, float]:
    """Of each matrix, of a folder's weights beside the dense ones."""
    found = {}
    for name, own in linears(llmprune.load(folder, device="cpu", dtype="float32", dense=True)).items():
        change = (own.weight - dense[name].weight).detach()
        whole = dense[name].weight.detach()
        found[name] = float(((change @ gram[name]) * change).sum() / ((whole @ gram[name]) * whole).sum())
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| then rounded to | pruned to | error, pruned | rounded | both | both / sum, mean | most | at most 1 in |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        parts = [mean(row[kind].values()) for kind in KINDS]
        shares = [row["both"][name] / (row["pruned"][name] + row["rounded"][name]) for name in row["both"]]
        within = f"{sum(share <= 1 for share in shares)} of {len(shares)}"
        cells = [f"{row['bits']} bits", row["pattern"], *(f"{part:.2%}" for part in parts)]
        lines.append(f"| {' | '.join([*cells, f'{mean(shares):.3f}', f'{max(shares):.3f}', within])} |")
    return "\n".join([*lines, "", f"Bundled model, `balanced`, {SAMPLES} windows, {result['device']}, {result['date']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "50%"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    folder = resolve("llama").path
    tokenizer, _ = evaluation(folder, 1)
    ids = calibration_windows("pydoc", tokenizer, samples=SAMPLES, seqlen=LENGTH, seed=0).ids
    model = load_float32(folder)
    dense, gram = linears(model), grams(model, ids)
    some: dict[str, Any] = {"calibration": "pydoc", "samples": SAMPLES, "seqlen": LENGTH, "eval_text": "none"}
    result: dict[str, Any] = {
        "date": date.today().isoformat(), "versions": versions(), "device": processor_name(torch.device("cpu")), "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        rounded = {}
        for bits in args.bits:
            made = Path(scratch) / f"dense-{bits}"
            llmprune.quantise("llama", made, bits=bits, dtype="float32", **some)
            rounded[bits] = errors(dense, made, gram)
        for pattern in args.patterns:
            pruned = Path(scratch) / "pruned"
            llmprune.prune("llama", sparsity=pattern, output=pruned, overwrite=True, dtype="float32", **some)
            alone = errors(dense, pruned, gram)
            for bits in args.bits:
                both = Path(scratch) / "both"
                llmprune.quantise(pruned, both, bits=bits, overwrite=True, dtype="float32", **some)
                row = {"pruned": alone, "rounded": rounded[bits], "both": errors(dense, both, gram)}
                result["rows"].append({"pattern": pattern, "bits": bits, **row})
                print(table(result), flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
