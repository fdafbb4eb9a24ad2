"""`prune`: blocks of large models through the presets, with memory and a projection for all blocks; and whole small runs."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llmprune
from gpu.rows import Found, Row
from gpu.shapes import LLAMA_8B, LLAMA_70B, TINY, Place
from llmprune.job.record import RunRecord, excess_loss

SAMPLES, LENGTH = 128, 2048
WHOLE = {"8B": 32, "70B": 80}  # blocks
RECIPES: dict[str, dict[str, Any]] = {
    "fast": {"quality": "fast"},
    "balanced": {"quality": "balanced"},
    "best": {"quality": "best"},
    "fast, rotated": {"quality": "fast", "rotate": True},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda": {"method": "wanda"},
}


def rows(place: Place) -> list[Row]:
    found = [Row(f"8B, 2 blocks, {name}", partial(blocks, place, "8B", 2, own)) for name, own in RECIPES.items()]
    found.insert(3, Row("70B, 1 block, balanced", partial(blocks, place, "70B", 1, RECIPES["balanced"])))
    whole = {"main job": {}, "main job, float32": {"dtype": "float32"}}
    found += [Row(f"bundled model, {name}", partial(bundled, place, own)) for name, own in whole.items()]
    found.append(Row("mixture of experts, 2 blocks, balanced", partial(experts, place)))
    return [*found, Row("bundled model, a quarter of heads and neurons", partial(structured, place))]


def blocks(place: Place, name: str, count: int, recipe: dict[str, Any]) -> Found:
    """Random weights, random tokens: seconds and memory are those of the shapes, what is lost means nothing."""
    shape = TINY if place.small else {"8B": LLAMA_8B, "70B": LLAMA_70B}[name]
    record = _run(place, "llama", shape | {"num_hidden_layers": count, "vocab_size": 1024}, recipe)
    each = record.pruning_seconds() / count
    return _described(record) | {"seconds_a_block": each, "projected_minutes": each * WHOLE[name] / 60}


def experts(place: Place) -> Found:
    """A Mixtral of width 1024 with eight experts."""
    shape = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4}
    shape |= {"num_local_experts": 8, "num_hidden_layers": 2, "vocab_size": 1024}
    small = TINY | {"num_local_experts": 4, "vocab_size": 1024}
    record = _run(place, "mixtral", small if place.small else shape, RECIPES["balanced"])
    solved = sum(".experts." in site.name for site in record.sites)
    found = _described(record) | {"experts_matrices": solved}
    return found | {"right": found["right"] and solved > 0}


def _run(place: Place, family: str, shape: dict[str, Any], recipe: dict[str, Any]) -> RunRecord:
    torch.manual_seed(0)
    samples, length = (24, 32) if place.small else (SAMPLES, LENGTH)
    ids = torch.randint(3, shape["vocab_size"], (samples, length))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        with torch.device(place.device):
            config = AutoConfig.for_model(family, **shape)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        own: dict[str, Any] = {"device": str(place.device), "eval_text": "none", "output": Path(scratch) / "pruned"}
        return llmprune.prune(folder, sparsity="2:4", calibration=ids, **(own | recipe)).record


def _described(record: RunRecord) -> Found:
    errors = [site.error for site in record.sites if site.error is not None]
    right = bool(errors) and all(0 <= error < 1 for error in errors) and record.zeros() * 2 == record.weights()
    return {
        "seconds": record.seconds,
        "memory": record.phase_memory,
        "peak_memory": record.peak_memory,
        "predicted_seconds": record.predicted.get("seconds"),
        "solving": sum(site.seconds for site in record.sites),
        "output_error": record.output_error(),
        "right": right,
    }


def bundled(place: Place, options: dict[str, str]) -> Found:
    """The main job as the command runs it."""
    less: dict[str, Any] = {"samples": 8, "seqlen": 64, "eval_text": "none"} if place.small else {}
    with tempfile.TemporaryDirectory() as scratch:
        own: dict[str, Any] = {"device": str(place.device), "output": Path(scratch) / "pruned"}
        record = llmprune.prune("llama", sparsity="2:4", **(own | less | options)).record
    return _described(record) | _losses(record)


def structured(place: Place) -> Found:
    less: dict[str, Any] = {"samples": 8, "seqlen": 64, "eval_text": "none"} if place.small else {}
    with tempfile.TemporaryDirectory() as scratch:
        own: dict[str, Any] = {"device": str(place.device), "output": Path(scratch) / "pruned"}
        record = llmprune.prune("llama", heads="25%", neurons="25%", **own, **less).record
    return {"seconds": record.seconds, "memory": record.phase_memory, "structure": record.structure} | _losses(record)


def _losses(record: RunRecord) -> Found:
    if record.dense is None or record.pruned is None:
        return {}
    return {"dense": record.dense.value, "pruned": record.pruned.value, "excess_loss": excess_loss(record.dense, record.pruned)}
