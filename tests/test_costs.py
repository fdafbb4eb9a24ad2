"""What a model costs: against hooks on real modules, files on disk, and numbers by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_model, tokens
from test_families import EXPERTS
from test_structured import OPTIONS, model_of
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import llmprune
from llmprune.cost import energy, kv_cache, macs
from llmprune.cost.base import Sized
from llmprune.cost.footprint import changes
from llmprune.formats.packed import PackedFolder
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks, make_block
from llmprune.models.experts import is_experts
from llmprune.models.families import ROUTERS

COUNTED = {**{family: {} for family in FAMILIES}, **EXPERTS}


def sized(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Sized:
    storage = dict.fromkeys((name for name, _ in model.named_parameters()), dtype)
    blocks = [make_block(i, name, block, storage) for i, (name, block) in enumerate(find_blocks(model).items())]
    return Sized(model, blocks, 0, storage)


def multiplied(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Multiplications with matrices as `ids` go through the model, counted by hooks; experts by what they are sent."""
    routers, found = {row.name for row in ROUTERS}, []

    def see(module: torch.nn.Module, args: tuple, kwargs: dict, _: object) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        if is_experts(module):
            chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
            weights = sum(own[0].numel() for name, own in module.named_parameters() if own.ndim == 3)
            found.append(chosen.numel() * weights)
        else:
            found.append(x.numel() // x.shape[-1] * module.weight.numel())

    for name, module in model.named_modules():
        linear = isinstance(module, (torch.nn.Linear, Conv1D))
        router = name.rpartition(".")[2] in routers and hasattr(module, "weight")
        if linear or router or is_experts(module):
            module.register_forward_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    return sum(found)


@pytest.mark.parametrize("family", list(COUNTED))
def test_multiplications_are_those_that_hooks_count(family: str) -> None:
    model, ids = tiny_model(family, **COUNTED[family]), tokens(2, 12)
    counted = sized(model)
    assert multiplied(model, ids) == ids.numel() * macs.measure(counted)
    head = model.config.vocab_size * model.config.hidden_size
    assert macs.measure(counted) == head + sum(macs.of_block(model.config, block) for block in counted.blocks)


@pytest.mark.parametrize(("family", "dtype"), [("llama", "bfloat16"), ("gpt2", "float32"), ("mixtral", "float32")])
def test_bytes_are_those_of_the_files(family: str, dtype: str, saved, tmp_path: Path) -> None:
    """To the byte: before, after, and in memory, where a tied head is there once."""
    source = saved(model_of(family).to(getattr(torch, dtype)))
    record = llmprune.prune(source, output=tmp_path / "out", neurons="50%", layers="1", **OPTIONS).record
    before, after = record.structure["before"], record.structure["after"]
    for folder, cost in ((source, before), (tmp_path / "out", after)):
        stored = {name: info for file in folder.glob("*.safetensors") for name, info in sizes(file).items()}
        assert cost["disk_bytes"] == sum(stored.values()) == Checkpoint(folder).nbytes()
        loaded = llmprune.load(folder, device="cpu")
        assert cost["memory_bytes"] == sum(parameter.nbytes for parameter in loaded.parameters())
    assert after["disk_bytes"] == record.size["bytes_after"]
    assert "bytes_packed" not in record.size
    assert "weight bytes on disk" not in [title for title, *_ in changes(record.structure, {})]


def sizes(file: Path) -> dict[str, int]:
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        return {name: handle.get_tensor(name).nbytes for name in handle.keys()}  # noqa: SIM118


@pytest.mark.parametrize("pattern", ["2:4", "70%", "4:8"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_packed_bytes_are_those_of_the_packed_folder(family: str, pattern: str, saved, tmp_path: Path) -> None:
    """GPT-2's matrices are stored transposed, and never packed."""
    source = saved(model_of(family).to(torch.bfloat16))
    record = llmprune.prune(source, output=tmp_path / "out", sparsity=pattern, method="magnitude", **OPTIONS_OF_WEIGHTS).record
    if family == "gpt2":
        assert "bytes_packed" not in record.size
        return
    llmprune.pack(tmp_path / "out", tmp_path / "packed")
    packed = PackedFolder.open(tmp_path / "packed")
    assert record.size["bytes_packed"] == sum(info.nbytes for info in packed.tensors.values())
    assert record.size["bytes_packed"] == sum(sum(sizes(file).values()) for file in (tmp_path / "packed").glob("*.safetensors"))
    assert record.size["bytes_packed"] < record.size["bytes_after"]


OPTIONS_OF_WEIGHTS = {name: value for name, value in OPTIONS.items() if name != "round_to"}


def test_energy_is_that_of_the_published_numbers() -> None:
    """float32: 3.7 + 0.9 pJ a multiplication and addition; DRAM 1.3 to 2.6 nJ for 8 bytes."""
    model = tiny_model("llama")
    weights = macs.measure(sized(model))
    assert energy.measure(sized(model)) == round(weights * (4.6 + 4 * 1950 / 8) / 1e6)
    half = tiny_model("llama").to(torch.bfloat16)
    assert energy.measure(sized(half)) == round(weights * (1.5 + 2 * 1950 / 8) / 1e6)
    assert energy.measure(sized(model.double())) is None
    assert "estimate" in energy.TITLE
    assert "Horowitz" in energy.TITLE


def test_keys_and_values_are_those_of_a_real_cache() -> None:
    model, ids = tiny_model("llama"), tokens(1, 7)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache.measure(sized(model)) * 7 == held
