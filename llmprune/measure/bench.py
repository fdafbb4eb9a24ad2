"""`llmprune bench`: a packed model against itself dense, layer by layer and end to end, and in words whether it helps here."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.base.errors import InputError, plain_errors
from llmprune.base.words import count, size
from llmprune.formats.kernels import native
from llmprune.formats.kernels.timing import copies, graphed
from llmprune.formats.layer import Sparse24Linear, SparseLinear, nbytes, sparse_layers
from llmprune.formats.loading import load
from llmprune.job.record import versions
from llmprune.measure.speed import bytes_per_second, side_by_side
from llmprune.models.resolve import resolve, spelled

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
BATCHES = (1, 8, 32)
_STEPS = 16  # tokens that are decoded
_FEW = 32  # tokens at most, in decoding
_GAIN = 1.05  # what is called faster
Packed = Sparse24Linear | SparseLinear


@dataclass(frozen=True, slots=True)
class LayerTime:
    """A product of one layer shape with so many tokens: seconds of one call."""

    rows: int
    columns: int
    layers: int
    tokens: int
    dense: float
    packed: float
    dense_bytes: int
    packed_bytes: int

    @property
    def speedup(self) -> float:
        return self.dense / self.packed


@dataclass(frozen=True, slots=True)
class ModelTime:
    """The whole model: seconds of one forward over a prompt, and of one decoded token, for `batch` sequences."""

    phase: str
    batch: int
    tokens: int
    dense: float
    packed: float

    @property
    def speedup(self) -> float:
        return self.dense / self.packed


@dataclass(frozen=True, slots=True)
class Bench:
    """What was measured.

    Attributes:
        device: its name; `memory` is what it copies, bytes a second, measured in the same run.
        weights: bytes of all weights, dense and packed.
        advice: what the numbers say, in sentences.
    """

    device: str
    dtype: str
    memory: float
    weights: dict[str, int]
    layers: list[LayerTime]
    model: list[ModelTime]
    advice: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"date": date.today().isoformat(), "versions": versions()}


def bench(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokens: Sequence[int] = TOKENS,
    batches: Sequence[int] = BATCHES,
    length: int = 512,
    compiled: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Bench:
    """Time a packed model against itself dense, turn about.

    Args:
        folder: a packed folder, or a dense one whose layers are 2:4, or a Hub id of one.
        dtype: as for `load`.
        tokens: how many a layer is fed.
        batches: how many sequences the whole model is fed; none: layers only.
        length: of a prompt, in tokens.
        compiled: time the dense model by torch.compile, too.
        tell: hears what is being measured.

    Raises:
        InputError: no layer is packed or 2:4, or the folder cannot be loaded.
    """
    if min((*tokens, *batches, length), default=0) < 1:
        raise InputError("tokens, batches and length must be at least 1")
    with torch.no_grad(), plain_errors("measure fewer --tokens and --batches, or a shorter --length"):
        place = resolve(spelled(folder))
        packed = load(place.path, device=device, dtype=dtype)
        layers = sparse_layers(packed)
        if not layers:
            how = "prune it with --sparsity 2:4, or pack what is pruned otherwise"
            raise InputError(f"no layer of {folder}{place.shadowed} is packed or 2:4: {how}")
        where = next(iter(layers.values())).values.device
        tell = tell or (lambda text: None)
        found = [time for shape in _shapes(layers.values()) for time in layer_times(*shape, tokens, where, tell)]
        dense = load(place.path, device=device, dtype=dtype, dense=True, check=False)
        denses = [dense]
        if batches and where.type == "cpu" and packed.dtype in native.DTYPES:
            other = _other(packed.dtype)
            denses.append(load(place.path, device=device, dtype=other, dense=True, check=False))
        if compiled and batches:
            denses += [_compiled(model) for model in denses]
        whole = [time for batch in batches for time in model_times(denses, packed, batch, length, where, tell)]
        memory = bytes_per_second(where)
        sizes = {"dense": nbytes(dense), "packed": nbytes(packed)}
    name = (
        torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"CPU, {platform.machine()}, {count(torch.get_num_threads(), 'thread')}"
    )
    kind = str(packed.dtype).removeprefix("torch.")
    return Bench(name, kind, memory, sizes, found, whole, advice(where, found, whole, sizes))


def _other(dtype: torch.dtype) -> torch.dtype:
    """The other one that CPUs compute in: a dense model may be quicker in it."""
    return next(one for one in native.DTYPES if one != dtype)


def _compiled(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, its forward by torch.compile."""
    twin = copy.copy(model)
    twin.forward = torch.compile(model.forward, dynamic=True)
    return twin


def _shapes(layers: Iterable[Packed]) -> list[tuple[Packed, int]]:
    """One layer of each shape, and how many there are, the largest first."""
    by_shape: dict[tuple[int, int], list[Packed]] = {}
    for layer in layers:
        by_shape.setdefault((layer.out_features, layer.in_features), []).append(layer)
    largest = sorted(by_shape.values(), key=lambda same: -same[0].out_features * same[0].in_features)
    return [(same[0], len(same)) for same in largest]


def layer_times(
    layer: Packed,
    count: int,
    tokens: Sequence[int],
    device: torch.device,
    tell: Callable[[str], None],
    *,
    tuned: bool = True,
) -> list[LayerTime]:
    """Against a dense product, as torch does it: on a CPU in bfloat16 or float32, whichever is quicker; on a GPU and where
    `tuned`, also as Inductor's search finds it fastest, which takes some seconds a size.
    """
    tell(f"layer {layer.out_features} x {layer.in_features}")
    weight, plain = layer.weight, copy.deepcopy(layer)
    plain.bias = None
    size = sum(own.nbytes for name, own in plain.named_buffers() if name != "blob")
    many = copies(size, device)
    kinds = [weight.dtype, *([_other(weight.dtype)] if device.type == "cpu" and weight.dtype in native.DTYPES else [])]
    denses = {kind: [weight.to(kind, copy=True) for _ in range(many)] for kind in kinds}
    packeds = [copy.deepcopy(plain) for _ in range(many)]
    multiply = [functional.linear, *([_tuned()] if tuned and device.type == "cuda" else [])]
    found = []
    for number in tokens:
        x = torch.randn(number, layer.in_features, device=device, dtype=weight.dtype)
        plain(x)  # measures the road before a graph is captured
        torch._dynamo.reset()  # else its search stops after a few sizes
        pairs = [(one, x.to(kind), own) for one in multiply for kind, own in denses.items()]
        sides = [graphed([partial(one, x, w) for w in own], device) for one, x, own in pairs]
        sides.append(graphed([partial(own, x) for own in packeds], device))
        *dense, sparse = (seconds / many for seconds in side_by_side(sides, device))
        found.append(LayerTime(layer.out_features, layer.in_features, count, number, min(dense), sparse, weight.nbytes, size))
    return found


def _tuned() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(functional.linear, mode="max-autotune-no-cudagraphs", dynamic=False)


def model_times(
    denses: Sequence[PreTrainedModel],
    packed: PreTrainedModel,
    batch: int,
    length: int,
    device: torch.device,
    tell: Callable[[str], None],
) -> list[ModelTime]:
    """A forward over prompts, and a decoded token, for `batch` sequences of `length` tokens, or what positions allow: of the
    quickest dense model, and of the packed one.
    """
    dense = denses[0]
    positions = getattr(dense.config.get_text_config(), "max_position_embeddings", None) or length + _STEPS
    length = max(min(length, positions - _STEPS), 1)
    tell(f"whole model, batch {batch}")
    ids = torch.randint(dense.config.get_text_config().vocab_size, (batch, length), device=device)
    models, side = (*denses, packed), partial(side_by_side, device=device, turns=3)
    prompts = side([partial(model, ids, use_cache=False, logits_to_keep=1) for model in models])
    runs = side([partial(_generate, model, ids, new) for new in (1, 1 + _STEPS) for model in models])
    count = len(models)
    steps = [(long - short) / _STEPS for short, long in zip(runs[:count], runs[count:], strict=True)]
    found = [ModelTime("prefill", batch, batch * length, min(prompts[:-1]), prompts[-1])]
    if min(steps) <= 0:  # too short to be seen
        return found
    return [*found, ModelTime("decode", batch, batch, min(steps[:-1]), steps[-1])]


def _generate(model: Any, ids: Tensor, new: int) -> None:
    """On a GPU with a static cache, for which transformers compile the forward and capture CUDA graphs."""
    static = {"cache_implementation": "static"} if ids.device.type == "cuda" else {}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **static,
    )


def advice(device: torch.device, layers: Sequence[LayerTime], whole: Sequence[ModelTime], sizes: dict[str, int]) -> list[str]:
    """Whether packing helps here, in sentences."""
    said = [f"Packed weights take {sizes['packed'] / sizes['dense']:.0%} of the dense ones' memory ({_mib(sizes)})."]
    if device.type == "cpu":
        said.append(f"Dense is the quicker of bfloat16 and float32, packed is by {native.level()}.")
    if device.type == "cpu" and native.library() is None:
        said.append("Nothing was compiled for CPUs, so packed layers are slow here: load with dense=True for speed.")
        return said
    for phase, few in (("decode", True), ("prefill", False)):
        own = [one for one in whole if one.phase == phase]
        gains = [f"{one.speedup:.2f}x at batch {one.batch}" for one in own if one.speedup >= _GAIN]
        losses = [f"{one.batch} ({one.speedup:.2f}x)" for one in own if one.speedup < _GAIN]
        if gains:
            said.append(f"{phase.capitalize()} is faster: {', '.join(gains)}.")
        if losses:
            said.append(f"Packing does not speed up {phase} at batch {', '.join(losses)} on this device.")
        slow = [time for time in layers if (time.tokens <= _FEW) == few and time.speedup < 1]
        if slow:
            shapes = dict.fromkeys(f"{time.rows} x {time.columns}" for time in slow)
            said.append(f"Layers that are slower than dense in {phase}: {', '.join(shapes)}.")
    return said


def _mib(sizes: dict[str, int]) -> str:
    return f"{size(sizes['packed'])} of {size(sizes['dense'])}"
