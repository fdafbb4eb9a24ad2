"""`checks`: every kernel against plain float64, and what the GPU must give as the CPU does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import llmprune
from gpu.rows import Found, Row
from gpu.shapes import Place, correlated, two_of_four
from llmprune.base.hardware import synchronize
from llmprune.formats.kernels import cusparselt, decode, decompress, dispatch, gemv, reference
from llmprune.formats.kernels.timing import graphed
from llmprune.formats.layer import Sparse24Linear
from llmprune.models.resolve import resolve
from llmprune.numerics.patterns import NM
from llmprune.numerics.stats import Gram
from llmprune.runs.compare_texts import dense_perplexity
from llmprune.solvers import METHODS

SMALL = [(7, 260), (33, 12)]
SHAPES = [*SMALL, (130, 1024), (512, 4096), (1024, 776)]
TOKENS = (1, 3, 8, 16, 17, 33, 64)
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the norm: what rounding the outputs costs, with room
SOLVERS = ("wanda", "sparsegpt", "annealed", "alps")


def rows(place: Place) -> list[Row]:
    found = [
        Row(
            f"{name} {rows}x{columns} {str(dtype).removeprefix('torch.')}", partial(kernel, place, name, (rows, columns), dtype)
        )
        for dtype in BOUNDS
        for rows, columns in (SMALL if place.small else SHAPES)
        for name in ("gemv", "decode", "decompress", "cusparselt")
    ]
    found.append(Row("a graph of packed products", partial(in_graph, place)))
    found.append(Row("two streams", partial(in_two_streams, place)))
    found += [Row(f"{name} as on the CPU", partial(as_on_cpu, place, name)) for name in SOLVERS]
    found.append(Row("streamed and in memory", partial(streamed_and_resident, place)))
    found.append(Row("activations on disk", partial(on_disk, place)))
    found.append(Row("packed and loaded", partial(packed_and_loaded, place)))
    return found if place.small else [*found, Row("dense perplexity, block by block", partial(perplexities, place))]


def kernel(place: Place, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Found:
    """The largest error over numbers of tokens; memory is poisoned first, and two runs must agree to the last bit."""
    w = two_of_four(*shape, dtype, place.device)
    packed = reference.pack(w)
    if name == "decompress":
        run = partial(decompress.decompress24, packed.values, packed.meta, packed.columns, fast=place.fast)
        return compared(place, {"": (run, w.double())}, 0.0)
    if name == "cusparselt" and not cusparselt.supported(*shape, dtype, place.device):
        return {"supported": False}
    bias = torch.randn(shape[0], device=place.device).to(dtype)
    cases: dict[str, tuple[Callable[[], Tensor], Tensor]] = {}
    blob = cusparselt.compress(w) if name == "cusparselt" else None
    for tokens in {"cusparselt": (300,), "gemv": (1, 2), "decode": TOKENS}[name]:
        x = torch.randn(tokens, shape[1], device=place.device).to(dtype)
        args: tuple[Any, ...] = (x, packed.values, packed.meta, bias)
        limits: dict[str, Any] = {"processors": place.processors, "shared": place.shared}
        if blob is not None:
            run = partial(cusparselt.multiply, x, blob, bias)
        elif name == "gemv":
            run = partial(gemv.gemv24, *args, fast=place.fast)
        else:
            run = partial(decode.decode24, *args, **limits, fast=place.fast)
        cases[f"{tokens} tokens"] = (run, x.double() @ w.double().T + bias.double())
    return compared(place, cases, BOUNDS[dtype])


def compared(place: Place, cases: dict[str, tuple[Callable[[], Tensor], Tensor]], bound: float) -> Found:
    worst, wrong = 0.0, []
    for case, (run, expected) in cases.items():
        first, second = (poisoned(run, place.device) for _ in range(2))
        gap = float((first.double() - expected).norm() / expected.norm().clamp_min(1e-30))
        worst = max(worst, gap)
        if not (gap <= bound and torch.equal(first, second)):
            wrong.append(f"{case}: error {gap:.2g}, {'same' if torch.equal(first, second) else 'not the same'} twice")
    return {"error": worst, "wrong": wrong, "right": not wrong}


def poisoned(run: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Run with NaN in the memory that is about to be given out."""
    if device.type == "cuda":
        waste = [torch.full((2**k,), float("nan"), device=device) for k in range(8, 26)]
        del waste
    result = run()
    synchronize(device)
    return result


def in_graph(place: Place) -> Found:
    """Replays of a captured product must give what the plain one gives, for inputs that came after the capture."""
    layer = Sparse24Linear.from_dense(two_of_four(512, 1024, torch.bfloat16, place.device))
    layer.prepare()
    wrong = []
    for tokens in (1, 8, 64, 200):
        x = torch.randn(tokens, 1024, device=place.device, dtype=torch.bfloat16)
        out = torch.empty(tokens, 512, device=place.device, dtype=torch.bfloat16)
        call = lambda x=x, out=out: out.copy_(dispatch.linear24(x, layer.packed, None, layer.blob))  # noqa: E731
        replay = graphed([call], place.device)
        for _ in range(3):
            x.normal_()
            replay()
            expected = x.double() @ layer.weight.double().T
            if not float((out.double() - expected).norm() / expected.norm()) < BOUNDS[torch.bfloat16]:
                wrong.append(tokens)
    return {"wrong": wrong, "right": not wrong}


def in_two_streams(place: Place) -> Found:
    """Products that two streams have under way at once must be, to the last bit, those that one after the other gives: the
    sums of shared blocks of rows, and the counters of who has arrived, belong to a stream."""
    size, times = (512, 2) if place.small else (4096, 50)
    layers = [Sparse24Linear.from_dense(two_of_four(size, size, torch.bfloat16, place.device)) for _ in range(2)]
    for layer in layers:
        layer.prepare()
    streams = [torch.cuda.stream(torch.cuda.Stream(place.device)) if place.fast else nullcontext() for _ in layers]
    wrong = []
    for tokens in (1, 8, 64, 200):
        inputs = [torch.randn(tokens, size, device=place.device, dtype=torch.bfloat16) for _ in layers]
        expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        synchronize(place.device)
        found: list[list[Tensor]] = [[], []]
        for _ in range(times):
            for layer, x, stream, own in zip(layers, inputs, streams, found, strict=True):
                with stream:
                    own.append(layer(x))
        synchronize(place.device)
        if not all(torch.equal(one, wanted) for own, wanted in zip(found, expected, strict=True) for one in own):
            wrong.append(tokens)
    return {"wrong": wrong, "right": not wrong}


def as_on_cpu(place: Place, name: str) -> Found:
    """The same matrix and inputs: what is lost of the outputs must be the same but for rounding."""
    torch.manual_seed(0)
    x, w = correlated(2048, 256, torch.device("cpu")), torch.randn(192, 256) / 16
    lost = {}
    for where in (torch.device("cpu"), place.device):
        gram = Gram(256, where)
        gram.add(x.to(where))
        solved = METHODS.get(name).solve(w.to(where), gram, NM(2, 4))
        gap = x.double() @ (w - solved.weight.cpu()).double().T
        lost[where.type] = float(gap.square().sum() / (x.double() @ w.double().T).square().sum())
    ratio = lost[place.device.type] / lost["cpu"]
    return {"lost": lost, "ratio": ratio, "right": abs(ratio - 1) < 1e-2}


def _pruned(place: Place, folder: Path | None, **options: Any) -> Any:
    own: dict[str, Any] = {"eval_text": "none", "dtype": "float32"}
    if place.small:
        own |= {"method": "sparsegpt", "calibration": torch.arange(3, 67).view(4, 16)}
    else:
        own |= {"quality": "fast", "samples": 16, "seqlen": 64}
    return llmprune.prune("llama", sparsity="2:4", output=folder, device=str(place.device), **(own | options))


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if name not in other or not torch.equal(one[name], other[name])]


def streamed_and_resident(place: Place) -> Found:
    """Weights pruned from folder to folder and in memory must be the same to the last bit, in the dtype they are saved in."""
    with tempfile.TemporaryDirectory() as scratch:
        streamed, resident = Path(scratch) / "streamed", Path(scratch) / "resident"
        _pruned(place, streamed, dtype="bfloat16")
        _pruned(place, None, dtype="bfloat16").model.save_pretrained(resident)
        one, other = _weights(streamed), _weights(resident)
        apart = _apart(one, other)
    return {"tensors": len(one), "apart": apart, "right": not apart}


def on_disk(place: Place) -> Found:
    """Hidden states on disk give the weights that those in memory give."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / where for where in ("memory", "disk")]
        for folder in folders:
            _pruned(place, folder, activations=folder.name)
        one, other = map(_weights, folders)
        apart = _apart(one, other)
    return {"tensors": len(one), "apart": apart, "right": not apart}


def packed_and_loaded(place: Place) -> Found:
    """The bundled model pruned, packed and loaded: logits must be the same, packed or not."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, packed = Path(scratch) / "out", Path(scratch) / "packed"
        _pruned(place, folder)
        llmprune.pack(folder, packed)
        ids = torch.arange(3, 35, device=place.device)[None]
        both = (llmprune.load(packed, device=str(place.device), dense=dense) for dense in (True, False))
        one, other = (model(ids).logits.float() for model in both)
    gap = float((one - other).norm() / one.norm())
    return {"logits_differ_by": gap, "right": gap < 2e-2}


def perplexities(place: Place) -> Found:
    """The dense perplexity as the stream of blocks finds it must be the whole model's."""
    record = _pruned(place, None, eval_text="pydoc", seqlen=512).record
    whole = dense_perplexity(resolve("llama").path, None, "pydoc", 512, str(place.device)).value
    return {"streamed": record.dense.value, "whole": whole, "right": abs(record.dense.value / whole - 1) < 1e-3}
