"""Everything that needs a GPU, in one run: kernels against their twins, layers and models timed, solvers, a whole run.

    python scripts/gpu_check.py --output eval/results/gpu.json
    TRITON_INTERPRET=1 python scripts/gpu_check.py --small --output /tmp/gpu.json   # the same on a CPU, to prove the script

Numbers are of random weights of the shapes of an 8B Llama, but for the run, which is of the bundled model. A kernel that is
not right ends the run with code 1, after the others have been tried; nothing is timed with a kernel that is not right.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import llmprune
from llmprune.base.hardware import operations_per_second, synchronize
from llmprune.base.words import count
from llmprune.formats.fuse import fuse
from llmprune.formats.kernels import cusparselt, decode, decompress, reference
from llmprune.formats.layer import Sparse24Linear, replace_module
from llmprune.job.record import versions
from llmprune.measure.bench import layer_times, model_times
from llmprune.measure.speed import bytes_per_second
from llmprune.models.discover import find_blocks
from llmprune.models.resolve import resolve
from llmprune.numerics.patterns import NM
from llmprune.numerics.stats import Gram
from llmprune.runs.compare import dense_perplexity
from llmprune.solvers import METHODS

CHECKED = [(7, 260), (130, 1024), (33, 12), (512, 4096), (1024, 776)]
LAYERS = [(14336, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (1024, 4096)]
SOLVED = [(4096, 4096), (14336, 4096), (4096, 14336)]
LLAMA: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = LLAMA | {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def two_of_four(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    w = torch.randn(rows, columns, device=device) / columns**0.5
    return torch.where(NM(2, 4).keep(torch.rand_like(w)), w, 0).to(dtype)


def check(device: torch.device, *, fast: bool) -> list[dict[str, Any]]:
    """Each kernel against plain float64, poisoned memory, twice."""
    found: list[dict[str, Any]] = []
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

    def record(kernel: str, what: str, run: Callable[[], Tensor], expected: Tensor, bound: float) -> None:
        row: dict[str, Any] = {"kernel": kernel, "case": what}
        try:
            first, second = (poisoned(run, device) for _ in range(2))
            gap = (first.double() - expected).norm() / expected.norm().clamp_min(1e-30)
            row |= {"error": float(gap), "same_twice": torch.equal(first, second)}
            row["right"] = bool(gap <= bound) and row["same_twice"]
        except Exception as error:  # noqa: BLE001  whatever a compiler or a driver says is a result here
            row |= {"right": False, "raised": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        found.append(row)

    for dtype in (torch.bfloat16, torch.float16):
        bound = 1e-2 if dtype == torch.bfloat16 else 2e-3
        for rows, columns in CHECKED if fast else CHECKED[:3]:
            w = two_of_four(rows, columns, dtype, device)
            packed, name = reference.pack(w), f"{rows}x{columns} {dtype}"
            bias = torch.randn(rows, device=device).to(dtype)
            for tokens, stages in ((1, 1), (3, 1), (8, 2), (16, 1), (17, 2), (32, 1)):
                x = torch.randn(tokens, columns, device=device).to(dtype)
                own: dict[str, Any] = {"processors": processors, "fast": fast, "stages": stages}
                run = partial(decode.decode24, x, packed.values, packed.meta, bias, **own)
                record(
                    "decode",
                    f"{name} x {tokens}, {count(stages, 'stage')}",
                    run,
                    x.double() @ w.double().T + bias.double(),
                    bound,
                )
            run = partial(decompress.decompress24, packed.values, packed.meta, packed.columns, fast=fast)
            record("decompress", name, run, w.double(), 0.0)
            if cusparselt.supported(rows, columns, dtype, device):
                x = torch.randn(300, columns, device=device).to(dtype)
                run = partial(cusparselt.multiply, x, cusparselt.compress(w), bias)
                record("cusparselt", name, run, x.double() @ w.double().T + bias.double(), bound)
    return found


def poisoned(run: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Run with NaN in the memory that is about to be given out."""
    if device.type == "cuda":
        waste = [torch.full((2**k,), float("nan"), device=device) for k in range(8, 26)]
        del waste
    result = run()
    synchronize(device)
    return result


def models(settings: dict[str, Any], device: torch.device) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random Llama whose linear layers are 2:4, dense and packed."""
    config = LlamaConfig(**settings, dtype=torch.bfloat16)
    with torch.device(device):
        dense, packed = (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval() for _ in range(2))
    for (name, own), twin in zip(find_blocks(dense).items(), find_blocks(packed).values(), strict=True):
        for path, module in list(twin.named_modules()):
            if isinstance(module, nn.Linear):
                w = two_of_four(module.out_features, module.in_features, torch.bfloat16, device)
                own.get_submodule(path).weight.data = w
                replace_module(packed, f"{name}.{path}", Sparse24Linear.from_dense(w))
    fuse(packed)
    for layer in (module for module in packed.modules() if isinstance(module, Sparse24Linear)):
        layer.prepare()
    return dense, packed


def solve(shapes: list[tuple[int, int]], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of a Gram over 128k tokens (float32), and of solvers to 2:4."""
    found = []
    for rows, columns in shapes:
        w, gram = torch.randn(rows, columns, device=device), Gram(columns, device)
        x = torch.randn(min(2**14, 8 * columns), columns, device=device)
        row: dict[str, Any] = {"rows": rows, "columns": columns}
        synchronize(device)
        start = time.perf_counter()
        for _ in range(8):
            gram.add(x)
        synchronize(device)
        row |= {"gram_tokens": 8 * len(x), "gram": time.perf_counter() - start}
        for name in ("wanda", "sparsegpt", "annealed"):
            for _ in range(2):  # the first warms up
                synchronize(device)
                start = time.perf_counter()
                METHODS.get(name).solve(w, gram, NM(2, 4))
                synchronize(device)
                row[name] = time.perf_counter() - start
        found.append(row)
    return found


def whole_run(device: torch.device, *, small: bool) -> dict[str, Any]:
    """The bundled model through `balanced`, packed and loaded again: logits must be the same, packed or not, and the dense
    perplexity that the stream of blocks finds must be the whole model's.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, packed = Path(scratch) / "out", Path(scratch) / "packed"
        options: dict[str, Any] = {"samples": 8, "seqlen": 64, "eval_text": "none"} if small else {"dtype": "float32"}
        record = llmprune.prune("llama", sparsity="2:4", output=folder, device=str(device), **options).record
        llmprune.pack(folder, packed)
        ids = torch.arange(3, 35, device=device)[None]
        with torch.no_grad():
            one, other = (llmprune.load(packed, device=str(device), dense=dense)(ids).logits.float() for dense in (True, False))
    gap = float((one - other).norm() / one.norm())
    whole = None if small else dense_perplexity(resolve("llama").path, None, "pydoc", 512, str(device)).value
    streamed = record.dense.value if record.dense else None
    return {
        "seconds": record.seconds,
        "memory": record.phase_memory,
        "dense_whole": whole,
        "dense": streamed,
        "pruned": record.pruned.value if record.pruned else None,
        "packed_logits_differ_by": gap,
        "right": gap < 2e-2 and (whole is None or (streamed is not None and abs(streamed / whole - 1) < 1e-3)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, kernels in Triton's interpreter")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device("cpu" if args.small else "cuda")
    result: dict[str, Any] = {"date": date.today().isoformat(), "versions": versions()}

    def keep(name: str, value: Any) -> None:  # what is known when the time is up is on disk
        result[name] = value
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {json.dumps(value)[:400]}", flush=True)

    with torch.no_grad():
        keep("device", torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted")
        checks = check(device, fast=not args.small)
        keep("checks", checks)
        wrong = [row for row in checks if not row["right"]]
        for row in wrong:
            print("WRONG", json.dumps(row), flush=True)
        keep("run", whole_run(device, small=args.small))
        if wrong or not result["run"]["right"]:
            return 1
        keep("memory_bytes_per_second", bytes_per_second(device))
        keep("operations_per_second", operations_per_second(device, torch.bfloat16))
        for rows, columns in [(64, 128)] if args.small else LAYERS:
            layer = Sparse24Linear.from_dense(two_of_four(rows, columns, torch.bfloat16, device))
            layer.prepare()
            tokens = (1, 4) if args.small else (1, 2, 4, 8, 16, 32, 64, 256, 2048, 8192)
            times = layer_times(layer, 1, tokens, device, print)
            keep(f"layer {rows}x{columns}", [asdict(time) | {"speedup": time.speedup} for time in times])
        keep("solvers", solve([(64, 128)] if args.small else SOLVED, device))
        dense, packed = models(TINY if args.small else LLAMA, device)
        for batch, length in ((1, 16),) if args.small else ((1, 512), (1, 4096), (8, 512), (32, 512)):
            times_ = model_times(dense, packed, batch, length, device, print)
            keep(f"llama batch {batch} prompt {length}", [asdict(time) | {"speedup": time.speedup} for time in times_])
    return 0


if __name__ == "__main__":
    sys.exit(main())
