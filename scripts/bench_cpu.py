"""Sparse products on this CPU beside dense ones: layers, and a random Llama of 1.1B parameters.

    python scripts/bench_cpu.py --output eval/results/cpu.json [--threads 1 2] [--only layers model memory]

All sides of a row are timed turn about in one process, on matrices that are not in the cache. Layers: torch in bfloat16 and
float32, a dense product of the same make as the sparse ones (dense_kernel.cpp, compiled by g++ with AVX-512), and packed ones.
The model: a decoded token over a cache of 32 tokens, and a prompt of 512 tokens, packed and dense, in bfloat16 or float32,
whichever decodes quicker.
Memory is that of a process that holds one model and decodes. Random weights; random masks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llmprune.base.hardware import processor_name, return_free_memory
from llmprune.formats.fuse import fuse
from llmprune.formats.kernels import bitmask, native
from llmprune.formats.kernels.bitmask import Bitmask
from llmprune.formats.layer import SparseLinear, replace_module
from llmprune.job.record import versions
from llmprune.numerics.patterns import NM

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 4, 8, 32, 512)
KINDS = ("2:4", "50%", "70%", "50%, int8", "50%, int4", "2:4, int4")
ENOUGH = 2**28  # bytes of copies of a matrix
PROMPT, CACHED, STEPS = 512, 32, 8
Row = dict[str, Any]


def random_matrix(rows: int, columns: int, kind: str, dtype: torch.dtype = torch.bfloat16) -> Bitmask:
    pattern, _, codes = kind.partition(", int")
    kept = (
        NM(2, 4).keep(torch.rand(rows, columns)) if pattern == "2:4" else torch.rand(rows, columns) >= float(pattern[:-1]) / 100
    )
    if not codes:
        return bitmask.pack(torch.where(kept, torch.randn(rows, columns), 0.0).to(dtype))
    most = 2 ** (int(codes) - 1)
    found = torch.randint(1, most, (rows, columns), dtype=torch.int8) * kept
    return bitmask.pack(found, torch.full((rows, columns // 128), 0.01, dtype=dtype), int(codes))


def size(packed: Bitmask) -> int:
    return sum(part.nbytes for part in (packed.mask, packed.values, packed.starts, packed.scale) if part is not None)


def turn_about(sides: Sequence[Callable[[], Any]], turns: int = 7) -> list[float]:
    """The least seconds of each."""
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(turns):
        for side, times in zip(sides, found, strict=True):
            start = time.perf_counter()
            side()
            times.append(time.perf_counter() - start)
    return [min(times) for times in found]


def each(calls: Iterable[Callable[[], Any]]) -> Callable[[], None]:
    many = list(calls)

    def row() -> None:
        for call in many:
            call()

    return row


def dense_kernel(folder: Path) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The product of dense_kernel.cpp; None where this CPU cannot run it."""
    if native.level() not in native.LEVELS[2:]:
        return None
    flags = ["-O3", "-shared", "-fPIC", "-march=native"]
    subprocess.run(["g++", *flags, "-o", folder / "dense.so", Path(__file__).parent / "dense_kernel.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "dense.so"))
    library.multiply.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, ctypes.c_void_p, ctypes.c_int64]

    def multiply(x: Tensor, tiles: Tensor) -> Tensor:
        y = torch.empty(len(tiles))
        addresses = [one.data_ptr() for one in (tiles, x, y)]
        library.multiply(*addresses, *tiles.shape, native._parallel(), torch.get_num_threads())
        return y

    return multiply


@torch.no_grad()
def layers(threads: Sequence[int]) -> list[Row]:
    """Each shape and number of tokens: seconds of a product."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        own = dense_kernel(Path(scratch))
        for height, width in SHAPES:
            many = ENOUGH // (2 * height * width) + 1
            halves = [torch.randn(height, width).bfloat16() for _ in range(many)]
            floats = [one.float() for one in halves]
            packed = {kind: copies_of(random_matrix(height, width, kind), many) for kind in KINDS}
            for count, tokens in ((count, tokens) for count in threads for tokens in TOKENS):
                torch.set_num_threads(count)
                x = torch.randn(tokens, width).bfloat16()
                sides = {
                    "torch bfloat16": each(partial(functional.linear, x, w) for w in halves),
                    "torch float32": each(partial(functional.linear, x.float(), w) for w in floats),
                    **{kind: each(partial(layer, x) for layer in same) for kind, same in packed.items()},
                }
                if own is not None and tokens == 1:
                    sides["dense of the same make"] = each(partial(own, x, w) for w in halves)
                seconds = dict(zip(sides, turn_about(list(sides.values()), 7 if tokens < 100 else 3), strict=True))
                row: Row = {"rows": height, "columns": width, "tokens": tokens, "threads": count}
                row |= {"seconds": {name: one / many for name, one in seconds.items()}}
                row |= {"bytes": {"dense": halves[0].nbytes} | {kind: size(same[0].packed) for kind, same in packed.items()}}
                rows.append(row)
                print(layer_line(row), flush=True)
    return rows


def copies_of(packed: Bitmask, many: int) -> list[SparseLinear]:
    cpu, held = torch.device("cpu"), packed.values.dtype if packed.scale is None else packed.scale.dtype
    return [SparseLinear(packed.to(cpu, held), None) for _ in range(many)]


def layer_line(row: Row) -> str:
    best = min(row["seconds"]["torch bfloat16"], row["seconds"]["torch float32"])
    gains = ", ".join(f"{kind} {best / row['seconds'][kind]:.2f}x" for kind in KINDS)
    return (
        f"{row['rows']}x{row['columns']}, {row['tokens']} tokens, {row['threads']} threads: {1e3 * best:.2f} ms dense; {gains}"
    )


def config() -> LlamaConfig:
    """About 1.1B parameters."""
    return LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip


def model_of(kind: str) -> PreTrainedModel:
    """Dense in a dtype, or with packed linear layers in its blocks, of which one of each shape is made and copied."""
    dtype = torch.float32 if kind == "dense float32" else torch.bfloat16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=dtype).eval() if kind.startswith("dense") else None
    if model is not None:
        return model
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(), dtype=dtype).eval()
    made: dict[tuple[int, int], Bitmask] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            shape = (module.out_features, module.in_features)
            made[shape] = made.get(shape) or random_matrix(*shape, kind)
            replace_module(model, name, SparseLinear(made[shape].to(torch.device("cpu"), dtype), None))
    rest = AutoModelForCausalLM.from_config(LlamaConfig(**(config().to_dict() | {"num_hidden_layers": 1})), dtype=dtype)
    weights = {name: own for name, own in rest.named_parameters() if ".layers." not in name}
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = weights[name].data if name in weights else torch.ones(parameter.shape, dtype=dtype)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Parameter(value))
    model.model.rotary_emb = rest.model.rotary_emb
    model.tie_weights()
    fuse(model)
    return model


class Decoder:
    """A model that decodes one token after the other over a cache that begins with some."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        found = model(input_ids=torch.randint(1000, (1, CACHED)), use_cache=True)
        self.cache, self.token = found.past_key_values, found.logits[:, -1:].argmax(-1)

    def __call__(self) -> None:
        for _ in range(STEPS):
            found = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
            self.token = found.logits[:, -1:].argmax(-1)
        self.cache.crop(-STEPS)


@torch.no_grad()
def models(threads: Sequence[int]) -> list[Row]:
    """Each kind beside the dense model, in the dtype that is quicker: seconds of a decoded token and of a prompt."""
    denses = {name: model_of(name) for name in ("dense bfloat16", "dense float32")}
    quickest = {}
    for count in threads:
        torch.set_num_threads(count)
        seconds = dict(zip(denses, turn_about([Decoder(model) for model in denses.values()], 2), strict=True))
        quickest[count] = min(seconds, key=lambda name: seconds[name])
        print(
            f"{count} threads, dense: { ({name: f'{STEPS / one:.1f} tokens/s' for name, one in seconds.items()}) }", flush=True
        )
    denses = {name: model for name, model in denses.items() if name in quickest.values()}
    prompt, rows = torch.randint(1000, (1, PROMPT)), []
    for kind in KINDS:
        packed = model_of(kind)
        for count in threads:
            torch.set_num_threads(count)
            both = {"dense": denses[quickest[count]], kind: packed}
            steps = turn_about([Decoder(model) for model in both.values()], 5)
            prompts = [partial(model, input_ids=prompt, use_cache=False, logits_to_keep=1) for model in both.values()]
            row: Row = {"kind": kind, "threads": count, "dense": quickest[count]}
            row["decode"] = {name: one / STEPS for name, one in zip(both, steps, strict=True)}
            row["prefill"] = dict(zip(both, turn_about(prompts, 4), strict=True))
            rows.append(row)
            print(model_line(row), flush=True)
        del packed, both
        gc.collect()
    return rows


def gain(row: Row, phase: str) -> float:
    """How much faster than the dense model."""
    return row[phase]["dense"] / row[phase][row["kind"]]


def model_line(row: Row) -> str:
    rate = 1 / row["decode"][row["kind"]]
    phases = f"decode {rate:.1f} tokens/s, {gain(row, 'decode'):.2f}x; prefill {gain(row, 'prefill'):.2f}x"
    return f"{row['kind']}, {row['threads']} threads: {phases}"


@torch.no_grad()
def memory(kind: str) -> int:
    """Bytes of this process while it decodes."""
    model = model_of(kind)
    gc.collect()
    return_free_memory()
    Decoder(model)()
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)


def page(result: Row) -> str:
    """The tables."""
    lines = [
        "# Sparse products on a CPU",
        "",
        f"Written by `scripts/bench_cpu.py`. {result['device']}, products by {result['level']}, {result['date']}, torch "
        f"{result['versions']['torch']}; random weights and masks. Dense is the quicker of torch in bfloat16 and float32.",
        "",
        tables(result),
    ]
    return "\n".join(lines)


def summary(result: Row) -> str:
    """What a reader of the documentation needs: the most threads, few numbers of tokens."""
    most = max(row["threads"] for row in result["layers"])
    few = [row for row in result["layers"] if row["threads"] == most and row["tokens"] in (1, 8, 512)]
    whole = [row for row in result["models"] if row["threads"] == most]
    how = f"{result['device']}, by {result['level']}, {result['date']}; beside the quicker of torch in bfloat16 and float32."
    return tables(result | {"layers": few, "models": whole}) + f"\n{how}\n"


def tables(result: Row) -> str:
    kinds = " | ".join(KINDS)
    lines = [
        f"| layer | tokens | threads | dense, ms | of the same make | {kinds} |",
        f"|---|---:|---:|---:|---:|{'---:|' * len(KINDS)}",
    ]
    for row in result.get("layers", ()):
        seconds = row["seconds"]
        best = min(seconds["torch bfloat16"], seconds["torch float32"])
        same = seconds.get("dense of the same make")
        cells = [f"{row['rows']} x {row['columns']}", str(row["tokens"]), str(row["threads"]), f"{1e3 * best:.2f}"]
        cells += [f"{best / same:.2f}x" if same else "", *(f"{best / seconds[kind]:.2f}x" for kind in KINDS)]
        lines.append(f"| {' | '.join(cells)} |")
    ones = [row for row in result.get("layers", ()) if row["tokens"] == 1 and "dense of the same make" in row["seconds"]]
    if ones:
        lines += ["", "One token, beside the dense product of the same make, and bytes read a second beside it:", ""]
        lines += [f"| layer | threads | {kinds} |", f"|---|---:|{'---:|' * len(KINDS)}"]
        for row in ones:
            seconds, nbytes = row["seconds"], row["bytes"]
            same = seconds["dense of the same make"]
            rate = nbytes["dense"] / same
            shares = [f"{same / seconds[kind]:.2f}x, {nbytes[kind] / seconds[kind] / rate:.0%}" for kind in KINDS]
            lines.append(f"| {row['rows']} x {row['columns']} | {row['threads']} | {' | '.join(shares)} |")
    if result.get("models"):
        held = result.get("memory", {})
        lines += [
            "",
            "| 1.1B Llama | threads | decode, tokens/s | dense | gain | prefill of 512, gain | memory of the process |",
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        for row in result["models"]:
            rates = [f"{1 / row['decode'][name]:.1f}" for name in (row["kind"], "dense")]
            cells = [row["kind"], str(row["threads"]), *rates]
            share = f"{held[row['kind']] / held['dense bfloat16']:.2f} of dense" if row["kind"] in held else ""
            lines.append(f"| {' | '.join([*cells, *(f'{gain(row, phase):.2f}x' for phase in ('decode', 'prefill')), share])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=("layers", "model", "memory"), default=("layers", "model", "memory"))
    parser.add_argument("--hold", help=argparse.SUPPRESS)  # a kind: print the memory that it takes
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.hold:
        print(memory(args.hold))
        return
    if args.output is None:
        parser.error("--output is required")
    result: Row = json.loads(args.output.read_text()) if args.output.exists() else {}
    result |= {"date": date.today().isoformat(), "versions": versions(), "level": native.level()}
    result["device"] = processor_name(torch.device("cpu"))
    if "memory" in args.only:
        command = [sys.executable, __file__, "--hold"]
        kinds = ("dense bfloat16", *KINDS)
        result["memory"] = {kind: int(subprocess.check_output([*command, kind]).split()[-1]) for kind in kinds}
        print(result["memory"], flush=True)
    for part, measure in (("layers", layers), ("model", models)):
        if part in args.only:
            result["models" if part == "model" else part] = measure(args.threads)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
