"""Sparse matrices as a mask and what is not zero: by hand, of every density and size, back bit for bit, damaged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from safetensors.torch import load_file, save_file
from test_sparse import stayed
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.files import sha256
from llmprune.formats.kernels import bitmask
from llmprune.formats.kernels.reference import compress
from llmprune.formats.layer import SparseLinear, sparse_layers
from llmprune.formats.matrices import TwoOfFour, encode, encode_codes
from llmprune.numerics import codes as rounding
from llmprune.output.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:not packed")
SHAPES = [(1, 1), (8, 64), (9, 65), (7, 63), (16, 128), (33, 200), (5, 4)]
DENSITIES = [0.0, 0.1, 0.3, 0.5, 0.9, 1.0]


def sparse(rows: int, columns: int, density: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(rows * columns)
    return torch.where(torch.rand(rows, columns) < density, torch.randn(rows, columns), 0.0).to(dtype)


def by_hand(mask: torch.Tensor, values: torch.Tensor, rows: int, columns: int, halves: bool) -> torch.Tensor:
    """The matrix, one bit after the other, by the description only."""
    stream, place = values.tolist(), 0
    found = torch.zeros(rows, columns, dtype=torch.int64 if not values.dtype.is_floating_point else torch.float64)
    for strip in range(mask.shape[0]):
        for chunk in range(mask.shape[1]):
            for row in range(8):
                held = [column for column in range(64) if int(mask[strip, chunk, row, column // 8]) >> (column % 8) & 1]
                for number, column in enumerate(held):
                    if halves:
                        value = (int(stream[place + number // 2]) >> (4 * (number % 2)) & 15) - 8
                    else:
                        value = stream[place + number]
                    found[8 * strip + row, 64 * chunk + column] = value
                place += -(-len(held) // 2) if halves else len(held)
    assert place == len(stream)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_by_hand_and_back(shape: tuple[int, int], density: float, dtype: torch.dtype) -> None:
    w = sparse(*shape, density, dtype)
    found = bitmask.pack(w)
    assert tuple(found.mask.shape) == bitmask.shape(*shape)
    assert torch.equal(by_hand(found.mask, found.values, *shape, halves=False), w.double())
    assert torch.equal(found.weight(), w)
    assert found.problem() is None


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_by_hand_and_back(shape: tuple[int, int], density: float, bits: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    codes[torch.rand(shape) > density] = 0
    scale = torch.rand(shape[0], 1).bfloat16() + 0.5
    found = bitmask.pack(codes, scale, bits)
    assert found.values.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert torch.equal(by_hand(found.mask, found.values, *shape, halves=bits < 8), codes.long())
    assert torch.equal(torch.cat([part.stored() for part in found.parts()]), codes)
    assert torch.equal(found.weight(), codes.to(scale.dtype) * scale)


@pytest.mark.parametrize("shape", [(1, 64), (8, 128), (19, 192), (16, 100), (5, 4)])
def test_two_of_four_as_a_mask(shape: tuple[int, int]) -> None:
    """Bit for bit, also where groups hold fewer than two."""
    w = sparse(*shape, 0.3, torch.bfloat16)
    w.view(-1, 4)[:, 1:3] = 0
    w[0, 0] = -0.0
    found = TwoOfFour(*compress(w)).masked()
    assert found.problem() is None
    assert torch.equal(found.starts, bitmask.starts(found.mask, halves=False))
    assert torch.equal(found.weight().view(torch.int16), w.view(torch.int16))
    assert torch.equal(by_hand(found.mask, found.values, *shape, halves=False), w.double())


def test_what_is_no_plain_number_is_stored_as_it_is() -> None:
    w = torch.zeros(3, 70)
    w[0, 1], w[1, 69], w[2, 3], w[2, 5] = -0.0, float("inf"), float("nan"), -float("inf")
    found = bitmask.pack(w).weight()
    assert torch.equal(found.view(torch.int32), w.view(torch.int32))


def test_matrices_of_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanded some strips at a time, it is the same matrix, and the same product."""
    w, x = sparse(37, 130, 0.4), torch.randn(2, 3, 130)
    whole = bitmask.pack(w)
    monkeypatch.setattr(bitmask, "_AT_ONCE", 3000)
    parts = bitmask.pack(w)
    assert len(list(parts.parts())) == 3
    assert all(torch.equal(getattr(parts, name), getattr(whole, name)) for name in ("mask", "values", "starts"))
    layer = SparseLinear(parts, torch.ones(37))
    assert torch.equal(layer.weight, w)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, w, torch.ones(37)))
    assert "in_features=130, out_features=37, bias=True, sparse weights" in repr(layer)


@pytest.mark.parametrize(("density", "share"), [(0.5, 0.57), (0.3, 0.37)])
def test_bytes_of_weights(density: float, share: float) -> None:
    w = sparse(512, 1024, density, torch.bfloat16)
    layer, tensors = encode("w", w)  # type: ignore[misc]
    assert (layer.kind, layer.nbytes()) == ("bitmask", w.nbytes)
    assert sum(own.nbytes for own in tensors.values()) <= share * w.nbytes


def test_bits_a_weight_of_two_of_four_codes() -> None:
    """Two of four weights with codes of 4 bits and a scale for 128 columns: 3.125 bits a weight, and no half byte is lost."""
    torch.manual_seed(0)
    codes = torch.randint(1, 8, (64, 1024), dtype=torch.int8)
    codes.view(64, 256, 4).scatter_(2, torch.rand(64, 256, 4).argsort(-1)[..., :2], 0)
    _, tensors = encode_codes("w", codes, torch.ones(64, 8, dtype=torch.bfloat16), 4)  # type: ignore[misc]
    assert 8 * sum(own.nbytes for own in tensors.values()) == 3.125 * codes.numel()
    why = encode_codes("w", torch.ones_like(codes), torch.ones(64, 8, dtype=torch.bfloat16), 4)
    assert why == "100% of it is not zero, so that a mask and the rest would take more"


@pytest.fixture
def unstructured(saved) -> Path:
    """A model whose linear layers are half zeros, at random, but for one kind."""
    model = tiny_model("llama").bfloat16()
    torch.manual_seed(0)
    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("k_proj"):
                module.weight.data *= torch.rand(module.weight.shape) < 0.5
    return saved(model)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: own for path in folder.glob("*.safetensors") for name, own in load_file(path).items()}


@pytest.fixture
def quantised(unstructured: Path, tmp_path: Path) -> Path:
    options = {"bits": 4, "group_size": 16, "rounding": "nearest", "calibration": tokens(2, 8)}
    llmprune.prune(unstructured, output=tmp_path / "codes", **options)
    return tmp_path / "codes"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 12), use_cache=False).logits


@pytest.mark.parametrize("kind", ["unstructured", "quantised"])
@pytest.mark.usefixtures("fresh_compiler")
def test_packed_loaded_and_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(kind)
    found = llmprune.pack(source, tmp_path / "packed")
    assert found.layers == 18
    assert {name.rpartition(".")[2] for name in found.dense} == {"k_proj"}
    assert found.after < (0.87 if kind == "unstructured" else 0.99) * found.before
    assert found.weights == 3 * (2 * 32 * 32 + 16 * 32 + 3 * 48 * 32)
    assert verify(tmp_path / "packed").problems == ()
    model = llmprune.load(tmp_path / "packed", device="cpu")
    layers = stayed(model)
    assert len(layers) == 18
    assert {type(layer) for layer in sparse_layers(model).values()} == {SparseLinear}
    plain = llmprune.load(source, device="cpu", dense=True)
    assert torch.equal(logits(llmprune.load(tmp_path / "packed", device="cpu", dense=True)), logits(plain))
    torch.testing.assert_close(logits(model), logits(plain), rtol=0.02, atol=0.02)
    assert all(torch.equal(layer.weight, plain.get_submodule(name).weight) for name, layer in layers.items())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=tokens(2, 12), use_cache=False).logits, logits(model))
    other = llmprune.load(tmp_path / "packed", device="cpu")
    other.load_state_dict(model.state_dict())
    llmprune.unpack(tmp_path / "packed", tmp_path / "back")
    for path in (*source.glob("*.safetensors"), source / "config.json"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name


def test_a_packed_quantised_folder_is_read_by_a_twin_that_knows_the_documentation(quantised: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    llmprune.pack(quantised, packed)
    manifest, tensors = json.loads((packed / "packed.json").read_text()), stored(packed)
    before = stored(quantised)
    assert (manifest["format"], manifest["version"]) == ("llmprune-packed", 2)
    for name, entry in list(manifest["layers"].items())[:4]:
        assert (entry["kind"], entry["bits"], entry["dtype"]) == ("bitmask", 4, "bfloat16")
        rows, columns = entry["shape"]
        codes = by_hand(tensors[f"{name}.mask"], tensors[f"{name}.values"], rows, columns, halves=True)
        assert torch.equal(codes, rounding.unpack(before[f"{name}_packed"], 4, columns).long())
        assert torch.equal(tensors[f"{name}.scale"], before[f"{name}_scale"])
        assert entry["groups"] == tensors[f"{name}.scale"].shape[1]
    rest = {name for name in tensors if not name.endswith((".mask", ".values", ".scale"))}
    assert all(name in before and torch.equal(before[name], tensors[name]) for name in rest)


def test_a_folder_of_the_first_version_is_read(saved, tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.view(-1, 4)[:, 1:3] = 0
    source = saved(model)
    llmprune.pack(source, tmp_path / "packed")
    path = tmp_path / "packed" / "packed.json"
    manifest = json.loads(path.read_text())
    for layer in manifest["layers"].values():
        assert layer.pop("kind") == "2of4"
    path.write_text(json.dumps(manifest | {"format": "llmprune-2of4", "version": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays dense
        found = llmprune.load(tmp_path / "packed", device="cpu", dense=True)
    assert torch.equal(logits(found), logits(AutoModelForCausalLM.from_pretrained(source)))


def damaged(folder: Path, name: str, change) -> None:
    """A packed folder whose first tensor called so is another, its sums mended."""
    file = next(path for path in sorted(folder.glob("packed-*")) if any(n.endswith(name) for n in load_file(path)))
    tensors = load_file(file)
    own = next(n for n in sorted(tensors) if n.endswith(name))
    tensors[own] = change(tensors[own].clone()).contiguous()
    save_file(tensors, file)
    path = folder / "packed.json"
    manifest = json.loads(path.read_text())
    manifest["sha256"][file.name] = sha256(file)
    path.write_text(json.dumps(manifest))


def flipped(mask: torch.Tensor) -> torch.Tensor:
    mask[0, 0, 0, 0] ^= 1
    return mask


def outside(mask: torch.Tensor) -> torch.Tensor:
    mask[-1, -1, -1, -1] |= 128
    return mask


@pytest.mark.parametrize(("name", "change", "words"), [
    (".mask", flipped, "is damaged: it holds .* values, and its mask says"),
    (".mask", outside, "is damaged: its mask has bits outside the matrix"),
    (".mask", lambda mask: mask[:, :, :4], r"\.mask has shape"),
    (".mask", lambda mask: mask.to(torch.int8), "is of torch.bfloat16 and torch.int8, not torch.bfloat16 and torch.uint8"),
    (".values", lambda values: values[:-1], "is damaged: it holds"),
    (".values", lambda values: values[:, None], r"\.values has shape"),
    (".values", lambda values: values.float(), "is of torch.float32 and torch.uint8"),
    (".values", lambda values: values.fill_(float("nan")), "are not finite"),
])  # fmt: skip
def test_damage_is_one_line(name: str, change, words: str, unstructured: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    llmprune.pack(unstructured, packed)
    damaged(packed, name, change)
    with pytest.raises(InputError, match=words):
        llmprune.load(packed, device="cpu")
    if "finite" not in words:
        assert any(part in problem for problem in verify(packed).problems for part in (name, "layers"))


@pytest.mark.parametrize("entry", [
    {"bits": 9}, {"bits": 4, "groups": 5}, {"bits": 4, "groups": 0}, {"bits": 4}, {"kind": "other"}, {"shape": [0, 32]},
])  # fmt: skip
def test_a_manifest_that_makes_no_sense(entry: dict, quantised: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    llmprune.pack(quantised, packed)
    path = packed / "packed.json"
    manifest = json.loads(path.read_text())
    layer = next(iter(manifest["layers"].values()))
    if "bits" in entry:
        layer.pop("groups")
    layer |= entry
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="no layers and files that make sense: copy the folder again"):
        llmprune.load(packed, device="cpu")
