"""One contract for every family: discovered, replayed, pruned from disk and in memory, loaded by plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MIXED, tiny_model, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.data.windows import Windows
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks, make_block, unreached
from llmprune.models.experts import is_experts, observable
from llmprune.models.sites import Block
from llmprune.output.verify import verify
from llmprune.stream.activations import Activations
from llmprune.stream.capture import head
from llmprune.stream.tapes import Tapes

CPU = torch.device("cpu")

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
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS: dict[str, dict] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": _MOE | {"decoder_sparse_step": 1},
    "olmoe": _MOE,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "layer_types": MIXED},
    "deepseek_v3": _MOE
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
PARTLY: dict[str, dict] = {  # hybrids, and experts that transformers does not dispatch: the rest must be listed
    "qwen3_next": _MOE
    | {"shared_expert_intermediate_size": 16, "layer_types": _LINEAR, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1, "mamba_d_state": 8}
    | {"mamba_dt_rank": 4, "use_mamba_kernels": False},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
}
ALL = DENSE | EXPERTS | PARTLY
_ODD = {"2-D, of no linear layer", "3-D, of no linear layer"}
REASONS: dict[str, set[str]] = {"dense": set(), "experts": {"router", "bias"}, "partly": {"router", *_ODD}}


def kind(family: str) -> str:
    return "dense" if family in DENSE else "experts" if family in EXPERTS else "partly"


@pytest.fixture(params=list(ALL))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, **ALL[request.param])


def matrices(model: PreTrainedModel) -> Iterator[str]:
    """All parameters of at least two dimensions within the blocks."""
    for name, block in find_blocks(model).items():
        yield from (f"{name}.{path}" for path, parameter in block.named_parameters() if parameter.ndim > 1)


def describe(model: PreTrainedModel) -> list[Block]:
    storage = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    return [make_block(index, name, module, storage) for index, (name, module) in enumerate(find_blocks(model).items())]


def test_every_matrix_is_a_site_or_listed(model: PreTrainedModel) -> None:
    described = describe(model)
    assert len(described) == model.config.num_hidden_layers
    sites = [site for block in described for site in block.sites]
    skipped = {name: why for block in described for name, why in unreached(block).items()}
    assert {site.parameter for site in sites} | set(skipped) == set(matrices(model))
    assert not {site.parameter for site in sites} & set(skipped)
    assert set(skipped.values()) <= REASONS[kind(model.config.model_type)]
    parameters = dict(model.named_parameters())
    for name in {site.parameter for site in sites}:
        assert sum(site.weight.numel() for site in sites if site.parameter == name) == parameters[name].numel()
    assert len({site.name for site in sites}) == len(sites)


@torch.no_grad()
def test_replay_is_bit_exact(model: PreTrainedModel) -> None:
    """The model's own logits, from its embeddings, its blocks called one by one, and its head."""
    ids, blocks = tokens(2, 12), list(find_blocks(model).values())
    feed = Activations.record(model, blocks, Windows(ids, "test"), batch=2, device=torch.device("cpu"))
    with observable(model):
        for block in describe(model):
            feed.advance(block)
    if any(is_experts(module) for module in model.modules()):
        model.set_experts_implementation("eager")
    assert torch.equal(head(model, blocks, feed.hidden[0], input_ids=ids), model(ids).logits)


def test_going_on_in_the_middle_of_a_block_changes_no_bit(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage by stage, in both streams: the same weights as when every stage runs the block from its beginning."""
    other = copy.deepcopy(model)
    options = {"sparsity": "2:4", "method": "sparsegpt", "target": "corrected", "calibration": tokens(5, 16), "batch_size": 2}
    llmprune.prune(model, **options)
    monkeypatch.setattr(Tapes, "find", lambda *_: None)
    llmprune.prune(other, **options)
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@torch.no_grad()
def test_every_block_can_be_run_in_pieces(model: PreTrainedModel) -> None:
    feed = Activations.record(model, list(find_blocks(model).values()), Windows(tokens(3, 12), "t"), batch=2, device=CPU)
    with observable(model):
        for block in describe(model):
            for index in (0, 1):
                assert feed._tape(block, index) is not None
            feed.advance(block)


@pytest.mark.parametrize("sparsity", ["2:4", "50%"])
def test_pruned_from_disk_as_in_memory(model: PreTrainedModel, sparsity: str, tmp_path: Path, read_elsewhere) -> None:
    source, out = tmp_path / "source", tmp_path / "pruned"
    model.save_pretrained(source, max_shard_size="20KB")
    options = {"sparsity": sparsity, "method": "sparsegpt", "calibration": tokens(4, 16), "batch_size": 2}
    record = llmprune.prune(source, output=out, **options).record
    sites = {site.name for block in describe(model) for site in block.sites}
    assert {site.name for site in record.sites} | (sites & set(record.skipped)) == sites
    assert verify(out).problems == ()
    before, after = (dict(c.read(list(c.tensors))) for c in (Checkpoint(source), Checkpoint(out)))
    assert before.keys() == after.keys(), "names on disk"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {site.tensor for site in record.sites}
    llmprune.prune(model, **options)
    streamed = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(streamed[name], tensor), name
    assert read_elsewhere(out)["amiss"] == {}
