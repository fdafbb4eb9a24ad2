"""Channels are rotated without changing what a model computes, so that a mask costs less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_families import ALL
from test_permute import IDS, looked, lost, mask_cost, problem, random, write
from transformers import AutoConfig, AutoModelForCausalLM

import llmprune
from llmprune.base.errors import InputError
from llmprune.models.checkpoint import Checkpoint
from llmprune.numerics.grouping import DAMPING, inverse_of
from llmprune.numerics.patterns import NM
from llmprune.numerics.rotation import Anywhere, Neighbours, Read, Written, find_rotation
from llmprune.output.verify import verify
from llmprune.steps.channels.rotating import Rotating
from llmprune.steps.weights.step import PruneWeights

# what is rotated, where that is not the hidden channels: norms stand behind what writes, or subtract the mean
OTHER: dict[str, set[str]] = {
    **{family: {"values"} for family in ("gemma2", "gemma3_text", "olmo2", "phi", "starcoder2", "stablelm", "llama4_text")},
    **{family: set() for family in ("opt", "gpt2", "gpt_neox", "gpt_neo", "gptj", "codegen", "bloom", "falcon", "mpt")},
}
PLAIN = {"calibration": IDS, "batch_size": 2, "sparsity": "2:4", "method": "sparsegpt"}


def damped(gram: torch.Tensor) -> torch.Tensor:
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram))


@pytest.mark.parametrize(("size", "drop"), [(4, 2), (4, 3), (4, 1), (2, 1)])
def test_costs_are_those_of_solving_without_the_dropped(size: int, drop: int) -> None:
    """Of what reads rotated channels, and of what writes them."""
    w, x = problem(12)
    gram = x.T @ x / len(x)
    reading = Read.of(w, inverse_of(gram))
    found = find_rotation([reading], [], Neighbours(size, drop), random())
    rotation = found.matrix[0]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(12), rtol=0, atol=1e-5)
    order, pattern = list(range(12)), NM(size - drop, size)
    assert found.before == pytest.approx(mask_cost(w, damped(gram), order, pattern), rel=1e-3)
    turned = rotation.T @ damped(gram) @ rotation
    assert found.after == pytest.approx(mask_cost(w @ rotation, turned, order, pattern), rel=1e-3)
    assert found.after < 0.9 * found.before

    square = torch.randn(12, 12, generator=random(5))
    found = find_rotation([], [Written.of(square, inverse_of(gram), size)], Neighbours(size, drop), random())
    assert found.before == pytest.approx(mask_cost(square, damped(gram), order, pattern), rel=1e-3)
    assert found.after == pytest.approx(mask_cost(found.matrix[0].T @ square, damped(gram), order, pattern), rel=1e-3)
    assert found.after < found.before


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_any_weights_go_that_cost_least(share: float) -> None:
    """Each by what solving without it loses."""
    w, x = problem(12)
    gram = x.T @ x / len(x)
    found = find_rotation([Read.of(w, inverse_of(gram))], [], Anywhere(share), random())

    def cost(own: torch.Tensor, inputs: torch.Tensor) -> float:
        each = sorted(lost(row, inputs, [column]) for row in own for column in range(12))
        return sum(each[: round(share * len(each))])

    rotation = found.matrix[0]
    assert found.before == pytest.approx(cost(w, damped(gram)), rel=1e-3)
    assert found.after == pytest.approx(cost(w @ rotation, rotation.T @ damped(gram) @ rotation), rel=1e-3)
    assert found.after < 0.9 * found.before


def test_each_head_has_a_rotation_of_its_own() -> None:
    """And heads that share values one together."""
    w, x = problem(16)
    gram, pattern = x.T @ x / len(x), NM(2, 4)
    every = Read.of(w, inverse_of(gram), 4)
    sharing = [Read(every.weight[own::2], every.inverse[own::2]) for own in range(2)]
    values = torch.randn(8, 12, generator=random(5))
    found = find_rotation(sharing, [Written.of(values, torch.eye(12), 4, 2)], Neighbours(4, 2), random())
    turned = torch.block_diag(*found.matrix.repeat_interleave(2, 0))
    reads = mask_cost(w @ turned, turned.T @ damped(gram) @ turned, list(range(16)), pattern)
    writes = mask_cost(torch.block_diag(*found.matrix).T @ values, torch.eye(12), list(range(12)), pattern)
    assert found.after == pytest.approx(reads + writes, rel=1e-3)
    assert found.after < 0.9 * found.before


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short descents: what a rotation gains is not what is tested."""
    monkeypatch.setattr("llmprune.numerics.rotation.STEPS", 10)


@pytest.mark.parametrize("family", list(ALL))
@pytest.mark.usefixtures("quick")
def test_a_rotated_model_computes_the_same(family: str, saved, tmp_path: Path) -> None:
    model = tiny_model(family, **ALL[family])
    with torch.no_grad():  # norms that matter
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.rand(parameter.shape, generator=random())
    skeleton, found = looked(saved(model), Rotating)
    again = write(skeleton, found, tmp_path / "rotated")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-3, atol=2e-4)
    assert found.costs.keys() == OTHER.get(family, {"hidden"}), found.left
    assert ("hidden" in found.left) == (family in OTHER)
    assert all(after < before for before, after in found.costs.values())
    tied = model.config.get_text_config().tie_word_embeddings
    assert bool(found.copies) == (tied and "hidden" in found.costs)
    before, after = (Checkpoint(path) for path in (skeleton.checkpoint.folder, tmp_path / "rotated"))
    assert after.tensors.keys() == before.tensors.keys() | found.copies.keys()
    moved = {piece.disk for name in found.moves if name not in found.copies for piece in skeleton.names[name]}
    for name, tensor in before.read(list(before.tensors)):
        assert torch.equal(tensor, dict(after.read([name]))[name]) != (name in moved), name
        assert after.tensors[name].dtype == before.tensors[name].dtype


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pruned_after_rotating(dtype: torch.dtype, tied: bool, saved, tmp_path: Path, read_elsewhere) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    source, out = saved(model.to(dtype)), tmp_path / "out"
    run = llmprune.prune(source, output=out, rotate=True, permute=True, **PLAIN)
    assert verify(out).problems == ()
    assert read_elsewhere(out)["amiss"] == {}
    assert all(site.sparsity == pytest.approx(0.5) for site in run.record.sites)
    rotated, permuted = run.record.channels["rotated"], run.record.channels["permuted"]
    assert rotated["costs"].keys() == {"hidden"}
    assert permuted["costs"].keys() == {"values", "hidden", "neurons"}
    assert rotated["added"] == (model.lm_head.weight.numel() if tied else 0)
    assert AutoConfig.from_pretrained(out).tie_word_embeddings is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"], "nothing is left beside"
    again = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(own, torch.ones_like(own)) for name, own in again.named_parameters() if name.endswith("norm.weight"))
    with pytest.raises(InputError, match="were rotated and permuted"):
        llmprune.recover(out, output=tmp_path / "trained", tokens="2K", train="blocks")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt_oss", "gemma2"])
def test_a_model_in_memory_as_on_disk(family: str, saved, tmp_path: Path) -> None:
    model = tiny_model(family, **ALL[family])
    source = saved(model)
    streamed = llmprune.prune(source, output=tmp_path / "out", rotate=True, **PLAIN)
    run = llmprune.prune(model, rotate=True, output=tmp_path / "memory", **PLAIN)
    assert run.record.channels == streamed.record.channels
    once, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("out", "memory"))
    assert once.keys() == again.keys() == model.state_dict().keys()
    for name, tensor in once.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
        assert torch.equal(tensor, again[name]), name
    assert verify(tmp_path / "memory").problems == ()


@pytest.mark.usefixtures("quick")
def test_an_unfinished_run_goes_on_from_the_rotated_model(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, options = saved(tiny_model("llama", tie_word_embeddings=True)), PLAIN | {"rotate": True}
    expected = llmprune.prune(source, output=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(PruneWeights, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llmprune.prune(source, output=tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr(Rotating, "look", lambda *_: pytest.fail("looked again"))
        run = llmprune.prune(source, output=tmp_path / "out", **options)
    assert run.record.channels == expected.record.channels
    one, other = (Checkpoint(tmp_path / name) for name in ("whole", "out"))
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.read(list(one.tensors)):
        assert torch.equal(tensor, dict(other.read([name]))[name]), name


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sparsity", ["50%", "70%", "4:8", "1:4"])
def test_any_pattern(sparsity: str, saved, tmp_path: Path) -> None:
    source, options = saved(tiny_model("llama")), PLAIN | {"sparsity": sparsity}
    record = llmprune.prune(source, output=tmp_path / "out", rotate=True, **options).record
    assert record.channels["rotated"]["costs"].keys() == {"hidden"}
    assert verify(tmp_path / "out").problems == ()


def test_a_model_that_cannot_be_rotated_is_refused_but_by_a_preset(saved, tmp_path: Path) -> None:
    source = saved(tiny_model("gptj", **ALL["gptj"]))
    with pytest.raises(InputError, match="no channels of this model can be rotated"):
        llmprune.prune(source, output=tmp_path / "out", rotate=True, **PLAIN)
    with pytest.raises(InputError, match="no channels of this model can be permuted"):
        llmprune.prune(source, output=tmp_path / "out", permute=True, **PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    options = PLAIN | {"method": None, "quality": "max"}
    record = llmprune.prune(source, output=tmp_path / "out", **options).record
    assert [own["costs"] for own in record.channels.values()] == [{}, {}]
    assert verify(tmp_path / "out").problems == ()


def test_rotating_needs_a_sparsity(saved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rotate has no effect here"):
        llmprune.prune(saved(tiny_model("llama")), output=tmp_path / "out", rotate=True, neurons="25%", calibration=IDS)


def test_what_would_be_lost_by_rotating(saved, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    llmprune.prune(saved(tiny_model("llama")), output=pruned, **PLAIN)
    with pytest.raises(InputError, match="would fill its zeros"):
        llmprune.prune(pruned, output=tmp_path / "out", rotate=True, **PLAIN)
    with pytest.raises(InputError, match="scan is of the dense model as it was"):
        llmprune.prune(pruned, output=tmp_path / "out", rotate=True, scan="scan.json", allocate="sensitivity", **PLAIN)
    with pytest.raises(InputError, match="groups of at most 4"):
        llmprune.prune(
            saved(tiny_model("llama")), output=tmp_path / "out", rotate=True, permute=True, **PLAIN | {"sparsity": "4:8"}
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "source"], "nothing was begun"
