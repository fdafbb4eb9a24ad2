"""One contract for every family: discovered, replayed, pruned from disk and in memory, loaded by plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MIXED, tiny_model, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.data import Windows
from llmprune.integrity import verify
from llmprune.models.discover import find_blocks, make_block, unreached
from llmprune.stream.activations import Activations
from llmprune.stream.capture import head

_OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
DENSE: dict[str, dict] = FAMILIES | {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
    "gemma2": {"sliding_window": 4, "layer_types": MIXED, "query_pre_attn_scalar": 8},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"sliding_window": 4},
    "gpt_neox": {},
    "gpt_neo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "gptj": _OLD | {"rotary_dim": 4},
    "codegen": _OLD | {"rotary_dim": 4},
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {"new_decoder_architecture": True, "head_dim": None},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "smollm3": {},
    "olmo2": {},
    "granite": {},
    "starcoder2": {"sliding_window": 4},
    "stablelm": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=list(DENSE))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, **DENSE[request.param])


def matrices(model: PreTrainedModel) -> Iterator[str]:
    """All parameters of at least two dimensions within the blocks."""
    for name, block in find_blocks(model).items():
        yield from (f"{name}.{path}" for path, parameter in block.named_parameters() if parameter.ndim > 1)


def test_every_matrix_is_a_site_or_listed(model: PreTrainedModel) -> None:
    blocks = find_blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    storage = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    described = [make_block(index, name, module, storage) for index, (name, module) in enumerate(blocks.items())]
    sites = {f"{site.name}.weight" for block in described for site in block.sites}
    skipped = {name for block in described for name in unreached(block)}
    assert sites | skipped == set(matrices(model))
    assert not sites & skipped
    assert not skipped, "a dense model has nothing to leave out"


@torch.no_grad()
def test_replay_is_bit_exact(model: PreTrainedModel) -> None:
    """The model's own logits, from its embeddings, its blocks called one by one, and its head."""
    ids, blocks = tokens(2, 12), find_blocks(model)
    storage = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    feed = Activations.record(model, list(blocks.values()), Windows(ids, "test"), batch=2, device=torch.device("cpu"))
    for index, (name, module) in enumerate(blocks.items()):
        feed.advance(make_block(index, name, module, storage))
    assert torch.equal(head(model, list(blocks.values()), feed.hidden[0], input_ids=ids), model(ids).logits)


@pytest.mark.parametrize("sparsity", ["2:4", "50%"])
def test_pruned_from_disk_as_in_memory(model: PreTrainedModel, sparsity: str, folder: Path) -> None:
    family = model.config.model_type
    source, out = folder / family / "source", folder / family / sparsity.replace(":", "of")
    model.save_pretrained(source, max_shard_size="20KB")
    options = {"sparsity": sparsity, "method": "sparsegpt", "calibration": tokens(4, 16), "batch_size": 2}
    record = llmprune.prune(source, output=out, **options).record
    assert {f"{site.name}.weight" for site in record.sites} == set(matrices(model))
    assert verify(out).problems == ()
    llmprune.prune(model, **options)
    streamed = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(streamed[name], tensor), name


def test_all_load_and_generate_in_a_fresh_process(folder: Path) -> None:
    """After the tests above, with plain transformers: nothing missing, nothing unexpected."""
    outputs = sorted(path.parent for path in folder.glob("*/*/llmprune.json"))
    assert len(outputs) == 2 * len(DENSE)
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    text = model.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    print(json.dumps([folder, wrong, text.shape[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, outputs)], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        name, wrong, length = json.loads(line)
        assert not wrong, name
        assert length == 6, name
