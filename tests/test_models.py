"""Discovery on real families, and checkpoints that are not what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmprune.base.errors import InputError
from llmprune.base.files import INDEX, SINGLE
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks, make_block, unreached
from llmprune.models.names import Piece
from llmprune.models.resolve import resolve
from llmprune.models.skeleton import Skeleton, load_config

CPU = torch.device("cpu")


def skeleton(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(Checkpoint(folder), load_config(folder), CPU, dtype)


def test_discovery_finds_every_matrix(family: str) -> None:
    model = tiny_model(family)
    blocks = find_blocks(model)
    assert len(blocks) == 3
    storage = {name: p.dtype for name, p in model.named_parameters()}
    for index, (name, module) in enumerate(blocks.items()):
        assert model.get_submodule(name) is module
        block = make_block(index, name, module, storage)
        matrices = {n for n, p in module.named_parameters() if p.ndim == 2}
        assert {site.name.removeprefix(f"{name}.") + ".weight" for site in block.sites} == matrices
        assert unreached(block) == {}


def test_conv1d_is_seen_as_out_by_in() -> None:
    model = tiny_model("gpt2")
    layer = model.transformer.h[0].mlp.c_fc  # stores (in, out)
    block = make_block(0, "transformer.h.0", model.transformer.h[0], {n: p.dtype for n, p in model.named_parameters()})
    site = next(site for site in block.sites if site.module is layer)
    assert site.weight.shape == (128, 32)
    site.write(torch.arange(128.0 * 32).view(128, 32))
    assert layer.weight[1, 2] == 2 * 32 + 1


def test_matrices_of_no_linear_layer_are_named() -> None:
    model = tiny_model("mistral")
    block = find_blocks(model)["model.layers.0"]
    block.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    found = unreached(make_block(0, "model.layers.0", block, {n: p.dtype for n, p in model.named_parameters()}))
    assert found == {"model.layers.0.experts": "3-D, of no linear layer"}


def test_model_without_blocks() -> None:
    with pytest.raises(InputError, match="found no decoder blocks in Linear"):
        find_blocks(torch.nn.Linear(2, 2))


def test_skeleton_loads_what_from_pretrained_loads(family: str, saved) -> None:
    folder = saved(tiny_model(family))
    built = skeleton(folder)
    assert {p.device.type for p in built.model.parameters()} == {"meta"}
    inputs = torch.randint(3, 90, (2, 10))
    whole = type(built.model).from_pretrained(folder).eval()
    with torch.no_grad(), built.outside():
        for name in built.blocks:
            built.fill(built.inside(name))
        assert torch.equal(built.model(inputs).logits, whole(inputs).logits)
        assert built.parameters() == whole.num_parameters()
    built.release(name for block in built.blocks for name in built.inside(block))
    assert {p.device.type for p in built.model.parameters()} == {"meta"}


def test_base_model_checkpoint_without_prefix(tmp_path: Path) -> None:
    """Old checkpoints on the Hub hold the base model's names (GPT-2's `h.0...`)."""
    model = tiny_model("gpt2")
    model.config.save_pretrained(tmp_path)
    state = {k.removeprefix("transformer."): v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, tmp_path / SINGLE, metadata={"format": "pt"})
    built = skeleton(tmp_path)
    assert built.names["transformer.h.0.mlp.c_fc.weight"] == (Piece("h.0.mlp.c_fc.weight"),)


@pytest.fixture
def llama(saved) -> Path:
    return saved(tiny_model("llama"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def swap_tensor(folder: Path, name: str, change) -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"


def to_index(file: str):
    return lambda d: edit_json(d / INDEX, lambda value: value["weight_map"].update({Q: file}))


def to_config(**changes: object):
    return lambda d: edit_json(d / "config.json", lambda value: value.update(changes))


FAULTS = {
    "truncated": (lambda d: truncate(shard(d)), "truncated or corrupt"),
    "empty": (lambda d: shard(d).write_bytes(b""), "empty"),
    "garbage": (lambda d: shard(d).write_bytes(b"\xff" * 4000), "truncated or corrupt"),
    "lfs pointer": (lambda d: shard(d).write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "absent": (lambda d: shard(d).unlink(), "is missing"),
    "index is no json": (lambda d: (d / INDEX).write_text("{"), "is not JSON"),
    "index without map": (lambda d: (d / INDEX).write_text("{}"), "no weight_map"),
    "outside": (to_index("../x.safetensors"), "outside its folder"),
    "absolute": (to_index("/etc/passwd"), "outside its folder"),
    "wrong file": (lambda d: to_index(sorted(d.glob("*.safetensors"))[-1].name)(d), "does not hold it"),
    "dropped from the index": (lambda d: edit_json(d / INDEX, lambda v: v["weight_map"].pop(Q)), "does not list"),
    "one block more": (to_config(num_hidden_layers=4), "lacks tensors"),
    "one block less": (to_config(num_hidden_layers=2), "unexpected tensors"),
    "wrong shape": (lambda d: swap_tensor(d, Q, lambda t: t[:-1].clone()), "has shape"),
    "integers": (lambda d: swap_tensor(d, Q, lambda t: t.to(torch.int8)), "not floating point"),
    "quantised": (to_config(quantization_config={"quant_method": "gptq"}), "gptq"),
    "remote code": (to_config(model_type="mine", auto_map={"AutoConfig": "m.C"}), "code from its own repository"),
    "unknown type": (to_config(model_type="mine"), "no model that transformers can build"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "is not a JSON object"),
    "config is not utf-8": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "is not JSON"),
    "text for a number": (to_config(num_hidden_layers="3"), "transformers can"),
    "no heads": (to_config(num_attention_heads=0), "transformers can"),
    "no key-value heads": (to_config(num_key_value_heads=0), "transformers can"),
    "unknown dtype": (to_config(dtype="foo"), "transformers can"),
    "quantised, in a word": (to_config(quantization_config="gptq"), "gptq"),
    "no config": (lambda d: (d / "config.json").unlink(), "cannot read"),
    "not a causal lm": (lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "cannot build a causal LM"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faulty_checkpoints_are_refused_before_any_work(fault: str, llama: Path) -> None:
    break_it, words = FAULTS[fault]
    break_it(llama)
    with pytest.raises(InputError, match=words) as caught:
        skeleton(llama)
    assert "\n" not in str(caught.value)


def test_nan_weight_names_its_tensor(llama: Path) -> None:
    swap_tensor(llama, Q, lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))
    built = skeleton(llama)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        built.fill(built.inside("model.layers.1"))


def test_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pickle"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lama", "did you mean llama"),
        ("bert", "known: llama"),
        ("./nothing-here", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("nobody/nothing", "cannot fetch nobody/nothing"),
        ("a b/c", "neither a folder nor a Hub id"),
    ],
)
def test_unresolvable_models(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_null_quantisation_is_none(llama: Path) -> None:
    to_config(quantization_config=None)(llama)
    assert load_config(llama).model_type == "llama"


def test_routers_are_no_sites() -> None:
    model = tiny_model("mistral")
    block = find_blocks(model)["model.layers.0"]
    block.mlp.gate = torch.nn.Linear(32, 4, bias=False)
    made = make_block(0, "model.layers.0", block, {n: p.dtype for n, p in model.named_parameters()})
    assert "model.layers.0.mlp.gate" not in {site.name for site in made.sites}
    assert unreached(made) == {"model.layers.0.mlp.gate.weight": "router"}


TIED = ("lm_head.weight", "model.embed_tokens.weight")


@pytest.mark.parametrize("on_disk", ["embeddings", "head", "both", "both, different"])
def test_a_tied_head_is_what_transformers_makes_of_it(on_disk: str, tmp_path: Path) -> None:
    """Loaded twice, as a run loads it: for the embeddings first, for the head at the end."""
    model = tiny_model("llama", tie_word_embeddings=True)
    embeddings = model.model.embed_tokens.weight.detach()
    state = {name: w.clone() for name, w in model.state_dict().items() if name not in TIED}
    if on_disk != "head":
        state["model.embed_tokens.weight"] = embeddings.clone()
    if on_disk != "embeddings":
        state["lm_head.weight"] = embeddings + 1 if on_disk == "both, different" else embeddings.clone()
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = skeleton(tmp_path)
    for _ in range(2):
        with found.outside():
            for name in TIED:
                assert torch.equal(found.model.get_parameter(name), expected.get_parameter(name))
        assert found.model.lm_head.weight.is_meta


def test_neither_of_two_tied_tensors_is_an_error(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    state = {name: w.clone() for name, w in model.state_dict().items() if name not in TIED}
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks tensors of LlamaForCausalLM: model.embed_tokens.weight"):
        skeleton(tmp_path)


def test_a_tensor_in_two_shards_is_an_error(saved) -> None:
    folder = saved(tiny_model("llama"))
    first, *_, last = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor}, last)
    with pytest.raises(InputError, match=f"holds tensor {name} twice, in {first.name} and in {last.name}"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("layers", "words"), [(2, "holds unexpected tensors"), (5, "lacks tensors"), (0, "found no decoder blocks")]
)
def test_a_layer_count_that_the_tensors_contradict_is_an_error(layers: int, words: str, saved) -> None:
    folder = saved(tiny_model("llama"))
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        skeleton(folder)
