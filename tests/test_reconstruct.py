"""Block reconstruction: masks and unpruned weights are kept, held-out error never rises, what is stored is what ran."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.base.errors import InputError
from llmprune.numerics import attention
from llmprune.steps import fitting

OPTIONS = {"sparsity": "50%", "calibration": tokens(16, 24), "batch_size": 2, "method": "wanda"}


def test_fits_kept_weights_and_norms_and_nothing_else(family: str) -> None:
    plain, fitted, dense = tiny_model(family), tiny_model(family), tiny_model(family).state_dict()
    skip = ["*.o_proj", "*.attn.c_proj", "*.out_proj"]
    skip = [glob for glob in skip if any(name.endswith(glob[1:] + ".weight") for name in dense)]
    llmprune.prune(plain, **OPTIONS, skip=skip)
    record = llmprune.prune(fitted, **OPTIONS, skip=skip, reconstruct=True).record
    assert [r.block for r in record.reconstructions] == [0, 1, 2]
    assert all(r.after < r.before for r in record.reconstructions)
    pruned = {f"{site.name}.weight" for site in record.sites}
    zeros, changed = plain.state_dict(), set()
    for name, tensor in fitted.state_dict().items():
        if not torch.equal(tensor, dense[name]):
            changed.add(name)
        if name in pruned and name.split(".")[2] == "0":  # later masks see other inputs
            assert torch.equal(tensor == 0, zeros[name] == 0), name
            assert not torch.signbit(tensor[tensor == 0]).any(), name
    vectors = {name for name in dense if dense[name].ndim == 1 and any(f".{i}." in name for i in range(3))}
    assert changed == pruned | vectors
    assert all(parameter.grad is None for parameter in fitted.parameters())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_biases_of_zeros_are_fitted_too(family: str) -> None:
    model = tiny_model(family)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias") and ".0." in name}
    with torch.no_grad():
        for bias in biases.values():
            bias.zero_()
    record = llmprune.prune(model, **OPTIONS, reconstruct=True).record
    assert record.reconstructions[0].after < record.reconstructions[0].before
    assert [name for name, bias in biases.items() if not bias.count_nonzero()] == []


def test_never_ends_worse_than_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps so large that every one of them does harm leave the block as it was."""
    monkeypatch.setattr(fitting, "RATE", 30.0)
    plain, fitted = tiny_model("llama"), tiny_model("llama")
    llmprune.prune(plain, **OPTIONS)
    record = llmprune.prune(fitted, **OPTIONS, reconstruct=True).record
    assert all(r.after == r.before for r in record.reconstructions)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(fitted.state_dict()[name], tensor), name


@pytest.mark.parametrize("steps", [1, 2, 28])
def test_the_rate_rises_then_falls_and_stays_within_its_bounds(steps: int) -> None:
    rates = [fitting.rate_at(step, steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert top <= fitting.RISE * (steps + 1)
    assert steps < 28 or (rates[0] < 0.2 and rates[-1] < 0.1)


def test_bfloat16_blocks_are_fitted_with_our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, and the fit gains by it."""
    seen: set[str] = set()
    for name in ("causal_attention", "causal_attention_backward"):
        own = getattr(attention, name)
        where = "llmprune.models.attention" if name == "causal_attention" else "llmprune.numerics.attention"
        monkeypatch.setattr(f"{where}.{name}", lambda *x, name=name, own=own: seen.add(name) or own(*x))
    record = llmprune.prune(tiny_model("llama").bfloat16(), **OPTIONS, reconstruct=True).record
    assert seen == {"causal_attention", "causal_attention_backward"}
    assert all(one.after < one.before for one in record.reconstructions)


def test_saved_norms_are_the_ones_that_ran(saved, tmp_path: Path) -> None:
    """float32 compute on a bfloat16 checkpoint: the error on record is that of what is on disk."""
    folder = saved(tiny_model("llama").to(torch.bfloat16))
    out = tmp_path / "out"
    record = llmprune.prune(folder, output=out, reconstruct=True, **OPTIONS).record
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pruned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    on_disk = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(tensor.dtype == torch.bfloat16 for tensor in on_disk.values())
    name = "model.layers.2.input_layernorm.weight"
    assert not torch.equal(on_disk[name], dense.state_dict()[name].bfloat16())
    ids = OPTIONS["calibration"][8:10]  # the fifth of eight batches is the one held out

    def last_block(model) -> torch.Tensor:
        seen = []
        handle = model.model.layers[2].register_forward_hook(lambda _, args, out: seen.append(out))
        model(ids, use_cache=False)
        handle.remove()
        return seen[0]

    with torch.no_grad():
        target, out_ = last_block(dense), last_block(pruned)
    error = float((out_ - target).square().sum() / target.square().sum())
    assert error == pytest.approx(record.reconstructions[2].after, rel=1e-3)


def test_needs_windows_to_hold_out() -> None:
    with pytest.raises(InputError, match="more samples or a smaller batch_size"):
        llmprune.prune(tiny_model("llama"), **{**OPTIONS, "batch_size": 16}, reconstruct=True)
