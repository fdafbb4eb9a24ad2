"""Packed folders: dense and back bit for bit, loaded as ordinary models, and refused where they are damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from safetensors.torch import load_file, save_file
from test_families import EXPERTS
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.files import sha256
from llmprune.formats.fuse import Fused, FusedPart, fuse
from llmprune.formats.kernels import bitmask
from llmprune.formats.kernels.native import library
from llmprune.formats.layer import Sparse24Linear, SparseLinear, nbytes, sparse_layers
from llmprune.formats.packed import FORMAT, VERSION, PackedFolder
from llmprune.models.discover import find_blocks
from llmprune.numerics.patterns import NM
from llmprune.output.verify import verify

IDS = tokens(2, 12)


def pruned(family: str, dtype: torch.dtype = torch.bfloat16, skip: tuple[str, ...] = (), **changes: object) -> PreTrainedModel:
    """A model whose blocks' linear layers are 2:4."""
    model = tiny_model(family, **(EXPERTS.get(family, {}) | changes)).to(dtype)
    for block in find_blocks(model).values():
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith(skip or ("none",)):
                kept = NM(2, 4).keep(module.weight.data.float().abs())
                module.weight.data = torch.where(kept, module.weight.data, 0)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(params=["compiled", "reference"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products for CPUs were compiled; where they were, the test runs without them, too."""
    if request.param == "reference":
        monkeypatch.setattr("llmprune.formats.loading.computes", lambda device, dtype: False)
    elif library() is None:
        pytest.skip("llmprune was installed without a compiler")
    return request.param == "compiled"


def stayed(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that stayed packed, fused or not, by name."""
    kinds = (Sparse24Linear, SparseLinear, FusedPart)
    return {name: own for name, own in model.named_modules() if isinstance(own, kinds) and "fused." not in name}


@pytest.fixture
def packed(saved, tmp_path: Path) -> Path:
    llmprune.pack(saved(pruned("llama")), tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "qwen3", "mixtral"])
def test_packed_and_back_is_the_same_to_the_last_byte(family: str, dtype: torch.dtype, saved, tmp_path: Path) -> None:
    source = saved(pruned(family, dtype))
    found = llmprune.pack(source, tmp_path / "packed")
    assert found.after <= (0.58 if dtype.itemsize == 2 else 0.54) * found.before
    back = llmprune.unpack(tmp_path / "packed", tmp_path / "back")
    assert (back.before, back.after, back.total_after) == (found.after, found.before, found.total_before)
    for path in source.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back" / "config.json").read_text())
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(source)), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back"))
    )


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text", "qwen3", "mixtral"])
def test_packed_and_dense_folders_load_alike(family: str, compiled: bool, saved, tmp_path: Path) -> None:
    source = saved(pruned(family, torch.float32))
    llmprune.pack(source, tmp_path / "packed")
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for folder in (tmp_path / "packed", source):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experts
            model = llmprune.load(folder, device="cpu", dtype="float32")
        assert {type(layer) for layer in sparse_layers(model).values()} == {SparseLinear if compiled else Sparse24Linear}
        assert len(stayed(model)) == sum(type(m) is torch.nn.Linear for b in find_blocks(plain).values() for m in b.modules())
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
        greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **greedy), plain.generate(IDS, **greedy))
        assert not sparse_layers(llmprune.load(folder, device="cpu", dense=True))
        assert torch.equal(logits(llmprune.load(folder, device="cpu", dtype="float32", dense=True)), logits(plain))


@pytest.mark.usefixtures("fresh_compiler")
def test_what_is_loaded_is_an_ordinary_module(packed: Path, compiled: bool) -> None:
    """Its state moves to another model, its dtype changes, it compiles whole."""
    model, other = (llmprune.load(packed, device="cpu", dtype="float32") for _ in range(2))
    for layer in sparse_layers(other).values():
        layer.values.zero_()
    assert not torch.equal(logits(model), logits(other))
    other.load_state_dict(model.state_dict())
    expected = logits(model)
    assert torch.equal(expected, logits(other))
    half = model.to(torch.bfloat16)
    for layer in sparse_layers(half).values():
        where, dtype = (layer.mask, torch.uint8) if isinstance(layer, SparseLinear) else (layer.meta, torch.int32)
        assert (layer.values.dtype, where.dtype) == (torch.bfloat16, dtype)
    torch.testing.assert_close(logits(half).float(), expected, rtol=0.1, atol=0.1)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected)


def test_memory_of_a_packed_model(packed: Path, compiled: bool, saved) -> None:
    dense = llmprune.load(packed, device="cpu", dense=True)
    model = llmprune.load(packed, device="cpu")
    own = sum(buffer.nbytes for layer in sparse_layers(model).values() for buffer in layer.buffers())
    whole = sum(dense.get_submodule(name).weight.nbytes for name in stayed(model))
    assert nbytes(dense) - nbytes(model) == whole - own
    assert dense.num_parameters() == sum(p.numel() for p in dense.parameters())


def test_layers_that_are_not_two_of_four_stay_dense_and_are_listed(saved, tmp_path: Path) -> None:
    source = saved(pruned("llama", skip=("down_proj",)))
    found = llmprune.pack(source, tmp_path / "packed")
    assert found.layers == 18
    assert sorted(found.dense) == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert all("100% of it is not zero" in why for why in found.dense.values())
    for folder in (source, tmp_path / "packed"):
        with pytest.warns(UserWarning, match=r"not packed, so dense: model\.layers\.0\.mlp\.down_proj, .*"):
            model = llmprune.load(folder, device="cpu")
        assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))


@pytest.mark.parametrize(("family", "why"), [
    ("mixtral", "100% of it is not zero, so that a mask and the rest would take more"),
    ("granitemoe", "an expert's, one of several in a tensor"),
])  # fmt: skip
def test_matrices_in_no_linear_layer_are_listed(family: str, why: str, saved, tmp_path: Path) -> None:
    source = saved(pruned(family))
    found = llmprune.pack(source, tmp_path / "packed")
    assert found.layers == 12
    assert len(found.dense) == 3 * 4 * 3
    assert set(found.dense.values()) == {why}
    with pytest.warns(UserWarning, match="not packed, so dense: .*experts.* and 33 more"):
        model = llmprune.load(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(source)))
    with pytest.raises(InputError, match=r"tensors of their own, and not transposed, can .*: stored transposed"):
        llmprune.pack(saved(tiny_model("gpt2"), "gpt2"), tmp_path / "other")


def test_experts_that_are_tensors_of_their_own_are_packed(saved, tmp_path: Path) -> None:
    """On disk; in the model they stay dense. The record says how many bytes that will take."""
    source = saved(pruned("mixtral"))
    record = llmprune.prune(
        source, sparsity="2:4", method="magnitude", calibration=tokens(2, 8), output=tmp_path / "out"
    ).record
    found = llmprune.pack(tmp_path / "out", tmp_path / "packed")
    assert (found.layers, found.dense) == (3 * (4 + 4 * 3), {})
    assert record.size["bytes_packed"] == found.total_after
    with pytest.warns(UserWarning, match="not packed, so dense: .*experts.* and 33 more"):
        model = llmprune.load(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))
    llmprune.unpack(tmp_path / "packed", tmp_path / "back")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_a_packed_model_does_not_save_itself_as_a_trap(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="llmprune pack and unpack convert folders"):
        llmprune.load(packed, device="cpu").save_pretrained(tmp_path / "trap")
    assert not (tmp_path / "trap").exists()


def test_the_copy_for_other_kernels_does_not_survive_another_dtype() -> None:
    layer = Sparse24Linear.from_dense(torch.zeros(8, 8))
    layer.blob = torch.ones(5)
    assert nbytes(layer) == sum(t.nbytes for t in (layer.values, layer.meta, layer.blob))
    assert layer.to("cpu").blob is not None
    assert layer.to(torch.float16).blob is None


def test_a_dense_model_loads_as_before(saved) -> None:
    folder = saved(tiny_model("llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not sparse_layers(llmprune.load(folder, device="cpu"))


def test_a_fresh_process_runs_it_and_transformers_refuse_it(packed: Path) -> None:
    code = f"""
import llmprune, torch
model = llmprune.load({str(packed)!r}, device="cpu", dtype="float32")
print(model(input_ids=torch.arange(3, 9)[None]).logits.double().sum().item())
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(packed)!r})
except OSError as error:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    total, refused = done.stdout.split()
    model = llmprune.load(packed, device="cpu", dtype="float32", dense=True)
    with torch.no_grad():
        assert float(total) == pytest.approx(model(input_ids=torch.arange(3, 9)[None]).logits.double().sum().item(), rel=1e-5)
    assert refused == "refused"


def test_the_record_of_a_run_is_kept_and_verified(tmp_path: Path) -> None:
    out = tmp_path / "out"
    llmprune.prune("llama", sparsity="2:4", method="magnitude", output=out, samples=1, seqlen=64, eval_text="none")
    llmprune.pack(out, tmp_path / "packed")
    assert verify(tmp_path / "packed").problems == ()
    assert verify(tmp_path / "packed").matrices == 28
    assert "llmprune.load" in (tmp_path / "packed" / "README.md").read_text()
    llmprune.unpack(tmp_path / "packed", tmp_path / "back")
    assert verify(tmp_path / "back").problems == ()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()
    }
    for unwanted in ("sparsity_config", "compression_config", "quantization_config"):
        assert unwanted not in (tmp_path / "packed" / "config.json").read_text()


def test_the_stored_format_is_the_documented_one(packed: Path, tmp_path: Path) -> None:
    """Read by a twin that knows the documentation only."""
    manifest = json.loads((packed / "packed.json").read_text())
    assert (manifest["format"], manifest["version"]) == (FORMAT, VERSION)
    dense = {}
    for path in (tmp_path / "source").glob("*.safetensors"):
        dense |= load_file(path)
    stored = {}
    for file in manifest["files"]:
        stored |= load_file(packed / file)
    places = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for name, entry in list(manifest["layers"].items())[:3]:
        values, codes = stored.pop(f"{name}.values"), stored.pop(f"{name}.codes")
        found = torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for row in range(entry["shape"][0]):
            for group in range(entry["shape"][1] // 4):
                code = int(codes[row, group // 2]) >> (4 * (group % 2)) & 15
                for i, place in enumerate(places[code]):
                    found[row, 4 * group + place] = values[row, 2 * group + i]
        assert torch.equal(found, dense[name])
    assert set(stored) - {f"{n}{e}" for n in manifest["layers"] for e in (".values", ".codes")} == set(dense) - set(
        manifest["layers"]
    )


def edit(folder: Path, **changes: object) -> None:
    path = folder / "packed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tamper(folder: Path, what: str) -> None:
    file = next(f for f in sorted(folder.glob("packed-*.safetensors")) if any(n.endswith(".codes") for n in load_file(f)))
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(".codes"))
    if what == "code":
        tensors[name][0, 0] = 0x66
    elif what == "values":
        tensors[name.replace(".codes", ".values")] = tensors[name.replace(".codes", ".values")].float()
    elif what == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    else:
        tensors.pop(name)
    save_file(tensors, file)
    edit(folder, sha256=json.loads((folder / "packed.json").read_text())["sha256"] | {file.name: sha256(file)})


@pytest.mark.parametrize(("damage", "words"), [
    (lambda d: edit(d, version=3), "is packed in version 3; this llmprune reads 2: update llmprune"),
    (lambda d: edit(d, format="other"), "has format 'other'"),
    (lambda d: edit(d, layers=3), "no layers and files that make sense"),
    (lambda d: edit(d, files={"../x.safetensors": "model.safetensors"}), "no safetensors file of a folder"),
    (lambda d: next(d.glob("packed-*")).unlink(), "is missing, though packed.json lists it"),
    (lambda d: (d / "packed.json").write_text("{"), "is not JSON"),
    (lambda d: tamper(d, "code"), "has a code of 6, and 5 is the highest"),
    (lambda d: tamper(d, "values"), "is of torch.float32 and torch.uint8"),
    (lambda d: tamper(d, "shape"), "copy the folder again"),
    (lambda d: tamper(d, "missing"), "codes is missing"),
    (lambda d: (f := next(d.glob("packed-*"))).write_bytes(f.read_bytes()[:-9]), "is not a whole safetensors file"),
])  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(damage, words: str, packed: Path, tmp_path: Path) -> None:
    damage(packed)
    for act in (lambda: llmprune.load(packed, device="cpu"), lambda: llmprune.unpack(packed, tmp_path / "back")):
        with pytest.raises(InputError, match=words):
            act()
    assert not (tmp_path / "back").exists()


def flip(file: Path) -> None:
    """The last bit: of the values or codes of a matrix, or of a text."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_changed_byte_is_seen(packed: Path, tmp_path: Path) -> None:
    file = next(packed.glob("packed-*"))
    flip(file)
    why = f"{file.name}: sha256 differs from the record"
    assert verify(packed).problems == (why,)
    for act in (
        llmprune.load,
        lambda folder: llmprune.load(folder, dense=True),
        lambda f: llmprune.unpack(f, tmp_path / "back"),
    ):
        with pytest.raises(InputError, match=rf"packed is damaged \({why}\): copy the folder again"):
            act(packed)
    assert llmprune.load(packed, check=False)
    assert not (tmp_path / "back").exists()


def test_unpacking_checks_what_it_copies(packed: Path, tmp_path: Path) -> None:
    (packed / "README.md").write_text("another card of the packed folder")
    llmprune.unpack(packed, tmp_path / "back")
    flip(packed / "config.json")
    with pytest.raises(InputError, match=r"config.json: sha256 differs"):
        llmprune.unpack(packed, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_verify_lists_all_that_is_wrong_with_a_packed_folder(packed: Path) -> None:
    cut, flipped, gone, *_ = sorted(packed.glob("packed-*"))
    cut.write_bytes(cut.read_bytes()[:-9])
    flip(flipped)
    gone.unlink()
    (packed / "llmprune.json").write_text("{")
    problems = verify(packed).problems
    assert problems[:3] == (
        f"{cut.name}: sha256 differs from the record",
        f"{flipped.name}: sha256 differs from the record",
        f"{gone.name}: missing",
    )
    (whole, lost, record) = problems[3:]
    assert f"{cut} is not a whole safetensors file" in whole
    assert f"{gone} is missing" in lost
    assert "llmprune.json is not JSON" in record


@pytest.mark.parametrize(("damage", "words"), [
    (lambda d: (d / "packed.json").write_text("{"), "packed.json is not JSON"),
    (lambda d: (d / "packed.json").write_text("[]"), "packed.json is not a JSON object"),
    (lambda d: edit(d, files=3), "no layers and files that make sense"),
    (lambda d: edit(d, sha256=None), "no layers and files that make sense"),
    (lambda d: edit(d, files={"../x.safetensors": "model.safetensors"}), "no safetensors file of a folder"),
])  # fmt: skip
def test_verify_checks_the_files_of_a_broken_manifest(damage, words: str, packed: Path) -> None:
    damage(packed)
    cut = next(packed.glob("packed-*"))
    cut.write_bytes(cut.read_bytes()[:-9])
    problems = verify(packed).problems
    assert any(words in problem for problem in problems)
    assert sum(f"{cut} is not a whole safetensors file" in problem for problem in problems) == 1
    assert not [problem for problem in problems if "config.json" in problem or "tensor" in problem.split(":")[0].split()]


def test_another_version_cannot_be_verified(packed: Path) -> None:
    edit(packed, version=3)
    with pytest.raises(InputError, match="packed in version 3"):
        verify(packed)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda d: (d / "llmprune.json").write_text("{"), r"llmprune.json is not JSON: .*"),
    (lambda d: (d / "llmprune.json").write_text("{}"), r"llmprune.json has schema None; this llmprune reads 1"),
    (lambda d: (d / "llmprune.json").write_text('{"schema": 1}'), r"llmprune.json is no record of a run: 'files'"),
    (lambda d: flip(d / "config.json"), r"is not what its llmprune.json says \(config.json: sha256 differs from the record\)"),
    (lambda d: (d / "README.md").unlink(), r"is not what its llmprune.json says \(README.md: missing\)"),
])  # fmt: skip
def test_a_record_that_does_not_hold_is_not_packed(damage, words: str, saved, tmp_path: Path) -> None:
    source, out = saved(pruned("llama")), tmp_path / "out"
    llmprune.prune(source, sparsity="2:4", method="magnitude", calibration=tokens(2, 8), output=out)
    damage(out)
    with pytest.raises(InputError, match=words + ": get the folder again, or remove its llmprune.json to pack it without"):
        llmprune.pack(out, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(("act", "words"), [
    (lambda t: llmprune.pack(t / "dense", t / "out"), "no matrix of .* would get smaller .* prune it with --sparsity 2:4"),
    (lambda t: llmprune.pack(t / "packed", t / "out"), "is packed already"),
    (lambda t: llmprune.pack(t / "source", t / "source"), "is the model's own folder"),
    (lambda t: llmprune.pack(t / "source", t / "packed"), "is not empty"),
    (lambda t: llmprune.unpack(t / "source", t / "out"), "holds no packed.json"),
    (lambda t: llmprune.unpack(t / "nothing", t / "out"), "folder .*nothing does not exist"),
    (lambda t: llmprune.unpack(t / "packed" / "packed.json", t / "out"), "packed.json is a file: give the folder"),
    (lambda t: llmprune.load(t / "packed", dtype="int8"), "unknown dtype 'int8'"),
    (lambda t: llmprune.prune(t / "packed", sparsity="2:4", output=t / "out"), "is packed: llmprune unpack it first"),
])  # fmt: skip
def test_bad_input_is_one_line(act, words: str, packed: Path, saved, tmp_path: Path) -> None:
    saved(tiny_model("llama"), "dense")
    with pytest.raises(InputError, match=words):
        act(tmp_path)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_an_error_before_any_work(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, told = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    for act, source in ((llmprune.pack, tmp_path / "source"), (llmprune.unpack, packed)):
        with pytest.raises(InputError, match=r"out needs \d+ KiB of disk, where 10 KiB are free: make room"):
            act(source, tmp_path / "out", tell=told.append)
    assert told == []
    assert not (tmp_path / "out").exists()


def test_overwrite_replaces_what_llmprune_wrote(packed: Path, tmp_path: Path) -> None:
    before = PackedFolder.open(packed)
    llmprune.pack(tmp_path / "source", packed, overwrite=True)
    assert PackedFolder.open(packed) == before


def test_a_layer_by_itself() -> None:
    w = torch.where(NM(2, 4).keep(torch.rand(9, 20)), torch.randn(9, 20), 0.0)
    layer = Sparse24Linear.from_dense(w, torch.ones(9))
    assert torch.equal(layer.weight, w)
    x = torch.randn(2, 3, 20)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, w, torch.ones(9)))
    assert "in_features=20, out_features=9, bias=True, 2:4" in repr(layer)
    with pytest.raises(ValueError, match="nonzeros, 2 allowed"):
        Sparse24Linear.from_dense(torch.ones(4, 4))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.usefixtures("fresh_compiler")
def test_fused_layers_put_out_the_same(family: str, compiled: bool, saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v and gate, up in one product each; the model's own code is untouched, and compiles whole."""
    folder = saved(pruned(family, torch.float32))
    monkeypatch.setattr("llmprune.formats.loading.fuse", lambda model: None)
    plain, fused = (llmprune.load(folder, device="cpu", dtype="float32") for _ in range(2))
    before = nbytes(fused)
    fuse(fused)
    states = plain.state_dict(), fused.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert len(sparse_layers(fused)) == len(sparse_layers(plain)) - 3 * 3
    assert before - nbytes(fused) == (3 * 3 * 8 if compiled else 0)  # of each joined layer the end of its last strip
    expected = logits(plain)
    torch.testing.assert_close(logits(fused), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(fused), logits(fused))
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(IDS, **greedy), fused.generate(IDS, **greedy))
    own = fused.model.layers[1].self_attn.k_proj.weight
    assert torch.equal(own, plain.model.layers[1].self_attn.k_proj.weight)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_state_of_fused_layers_is_that_of_the_single_ones(compiled: bool, saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(pruned("qwen2", torch.float32))
    monkeypatch.setattr("llmprune.formats.loading.fuse", lambda model: None)
    plain, fused = (llmprune.load(folder, device="cpu", dtype="float32") for _ in range(2))
    fuse(fused)
    for layer in sparse_layers(fused).values():
        layer.values.zero_()
    state = plain.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*layers.1.self_attn.k_proj.values"):
        fused.load_state_dict({name: value for name, value in state.items() if "1.self_attn.k_proj.values" not in name})
    name = f"layers.0.mlp.up_proj.{'mask' if compiled else 'meta'}"
    with pytest.raises(RuntimeError, match=rf"{name} is \(1,\), not"):
        fused.load_state_dict(state | {f"model.{name}": torch.zeros(1, dtype=torch.uint8)})
    fused.load_state_dict(state)
    torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [Sparse24Linear.from_dense, lambda w: SparseLinear(bitmask.pack(w), None)])
def test_a_fused_part_may_be_called_alone_and_again(make) -> None:
    layers = [make(torch.where(NM(2, 4).keep(torch.rand(n, 8)), torch.randn(n, 8), 0.0)) for n in (8, 2)]
    expected = [layer(torch.ones(3, 8)) for layer in layers]
    fused = Fused(layers)
    x = torch.ones(3, 8)
    for number in (1, 1, 0, 0, 1):
        torch.testing.assert_close(fused.part(x, number), expected[number])
    x = 2 * x
    torch.testing.assert_close(fused.part(x, 1), 2 * expected[1])


def test_loading_holds_one_dense_layer_at_a_time(saved, tmp_path: Path) -> None:
    """Of a fresh process: the peak beyond what is kept is far from a dense copy of the model."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "head_dim": 128}
    model = tiny_model("llama", **sizes).to(torch.bfloat16)
    for block in find_blocks(model).values():
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.unflatten(1, (-1, 4))[..., 2:] = 0
    whole = 2 * model.num_parameters()
    llmprune.pack(saved(model), tmp_path / "packed")
    code = f"""
import torch
torch.set_num_threads(1)
import llmprune
from llmprune.base.hardware import map_large_allocations, peak_memory, restart_peak_memory
import llmprune.runs.prune
map_large_allocations()
llmprune.load({str(tmp_path / "source")!r}, device="cpu", dense=True)
restart_peak_memory()
before = peak_memory()
model = llmprune.load({str(tmp_path / "packed")!r}, device="cpu")
print(peak_memory() - before, before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, _ = map(int, done.stdout.split())
    assert grown < 0.9 * whole
