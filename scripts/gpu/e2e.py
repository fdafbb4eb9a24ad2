"""`e2e`: a whole 8B-shaped model, dense against packed: one decoded token by graph replay, prompts, and `generate`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from gpu.rows import Found, Row
from gpu.shapes import LLAMA_8B, TINY, Place, two_of_four
from llmprune.formats.fuse import fuse
from llmprune.formats.layer import Sparse24Linear, nbytes, replace_module, sparse_layers
from llmprune.measure.bench import model_times
from llmprune.measure.speed import side_by_side
from llmprune.models.discover import find_blocks

DECODED = (
    (1, 512, False),
    (1, 512, True),
    (8, 512, False),
    (16, 512, False),
    (32, 512, False),
    (1, 4096, False),
    (8, 512, True),
)
PROMPTS = ((1, 512), (1, 2048), (4, 2048))  # sequences, tokens each; above: sequences, tokens in the cache, compiled
Pair = tuple[PreTrainedModel, PreTrainedModel]


def rows(place: Place) -> list[Row]:
    found = [Row("8B, packed as prepared", partial(prepared, place))]
    decoded, prompts = (((1, 16, False), (2, 16, False)), ((1, 16),)) if place.small else (DECODED, PROMPTS)
    for batch, length, compiled in decoded:
        key = f"8B, decode, batch {batch}, {length} in the cache{', compiled' if compiled else ''}"
        found.append(Row(key, partial(decode, place, batch, length, compiled)))
    found += [Row(f"8B, prefill, {batch} x {length}", partial(prefill, place, batch, length)) for batch, length in prompts]
    return [*found, Row("8B, generate as compiled by transformers, batch 1", partial(generate, place))]


def prepared(place: Place) -> Found:
    dense, packed = models(place)
    layers = sparse_layers(packed)
    blobs = sum(layer.blob is not None for layer in layers.values())
    return {"bytes": {"dense": nbytes(dense), "packed": nbytes(packed)}, "layers": len(layers), "blobs": blobs}


@cache
def models(place: Place) -> Pair:
    """A random Llama whose linear layers are 2:4, dense and packed."""
    config = LlamaConfig(**(TINY if place.small else LLAMA_8B), dtype=torch.bfloat16)
    with torch.device(place.device):
        dense, packed = (AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval() for _ in range(2))
    packed.load_state_dict(dense.state_dict())
    for (name, own), twin in zip(find_blocks(dense).items(), find_blocks(packed).values(), strict=True):
        for path, module in list(twin.named_modules()):
            if isinstance(module, nn.Linear):
                w = two_of_four(module.out_features, module.in_features, torch.bfloat16, place.device)
                own.get_submodule(path).weight.data = w
                replace_module(packed, f"{name}.{path}", Sparse24Linear.from_dense(w))
    fuse(packed)
    for layer in sparse_layers(packed).values():
        if isinstance(layer, Sparse24Linear):
            layer.prepare()
    return dense, packed


def decode(place: Place, batch: int, length: int, compiled: bool) -> Found:
    """Seconds of one token: a step captured as a CUDA graph over a static cache, the two models turn about."""
    both = [Step(model, batch, length, compiled) for model in models(place)]
    one, other = (step.logits() for step in both)
    gap = float((one - other).norm() / one.norm())
    dense, packed = side_by_side([step.replay for step in both], place.device)
    return {"dense": dense, "packed": packed, "speedup": dense / packed, "logits_differ_by": gap, "right": gap < 0.1}


class Step:
    """One decoded token after `length` others, which can be replayed: the cache goes back to where it was."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int, compiled: bool) -> None:
        device = model.device
        generator = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randint, model.config.vocab_size, generator=generator, device=device)
        self._cache = StaticCache(config=model.config, max_cache_len=length + 8)
        for part in draw((batch, length)).split(1024, dim=1):
            model(part, past_key_values=self._cache, logits_to_keep=1)
        self._model = torch.compile(model.forward, dynamic=False) if compiled else model
        self._next, self._at = draw((batch, 1)), torch.full((1, 1), length, device=device)
        self.replay = self._captured(device)

    def _captured(self, device: torch.device) -> Callable[[], None]:
        if device.type != "cuda":
            return self._run
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._run()
            self._run()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph.replay

    def _run(self) -> None:
        self._out = self._model(self._next, position_ids=self._at, past_key_values=self._cache).logits
        layers: Any = self._cache.layers
        for layer in layers:
            layer.cumulative_length.sub_(1)

    def logits(self) -> torch.Tensor:
        self.replay()
        return self._out.float()


def prefill(place: Place, batch: int, length: int) -> Found:
    """Seconds of a forward over prompts, launched one by one as transformers does."""
    pair = models(place)
    ids = torch.randint(pair[0].config.vocab_size, (batch, length), device=place.device)
    dense, packed = side_by_side(
        [partial(model, ids, use_cache=False, logits_to_keep=1) for model in pair], place.device, turns=3
    )
    return {"dense": dense, "packed": packed, "speedup": dense / packed}


def generate(place: Place) -> Found:
    dense, packed = models(place)
    found = model_times([dense], packed, 1, 16 if place.small else 512, place.device, lambda text: None)
    return {time.phase: {"dense": time.dense, "packed": time.packed, "speedup": time.speedup} for time in found}
