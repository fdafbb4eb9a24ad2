"""Our causal attention: as exact as torch's, one operation to whoever watches, and used only where it is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model, tokens
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface

from llmprune.models.attention import fast_attention
from llmprune.numerics import attention
from llmprune.numerics.attention import causal_attention

# batch, heads, groups of keys, tokens, width: several pieces, a last piece that is not full, one token, one head
SHAPES = [(2, 4, 2, 300, 16), (1, 6, 6, 128, 8), (3, 4, 1, 129, 32), (2, 2, 2, 1, 16), (1, 1, 1, 77, 24)]


def arguments(shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """q, k and v as transformers make them, views of (batch, tokens, heads, width), and a gradient of the output."""
    batch, heads, groups, count, width = shape
    seed = torch.Generator().manual_seed(3)
    each = [torch.randn(batch, count, n, width, generator=seed).bfloat16().transpose(1, 2) for n in (heads, groups, groups)]
    return [x.requires_grad_() for x in each], torch.randn(batch, heads, count, width, generator=seed).bfloat16()


def results(attend: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scores", [1, attention.SCORES], ids=["one group at a time", "all"])
def test_output_and_gradients_are_as_near_to_float64_as_those_of_torch(
    shape: tuple[int, ...], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    inputs, grad = arguments(shape)

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    exact = results(torchs, [x.detach().double().requires_grad_() for x in inputs], grad.double())
    ours = results(lambda *x: causal_attention(*x, 0.3), inputs, grad)
    for own, theirs, right in zip(ours, results(torchs, inputs, grad), exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert own.shape == right.shape
        error, allowed = ((x.double() - right).norm() for x in (own, theirs))
        assert float(error) <= 1.5 * float(allowed) + 1e-12 * float(right.norm())


def test_what_torch_asks_of_an_operation() -> None:
    inputs, _ = arguments((2, 4, 2, 20, 16))
    torch.library.opcheck(causal_attention, (*inputs, 0.25))


def test_one_operation_forward_and_one_backward() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs, grad = arguments((2, 4, 2, 300, 16))
    with Watch():
        results(lambda *x: causal_attention(*x, 0.3), inputs, grad)
    assert [name for name in seen if "detach" not in name] == [
        "llmprune.causal_attention.default",
        "llmprune.causal_attention_backward.default",
    ]


def test_operations_are_counted_as_torch_counts_its_own() -> None:
    inputs, grad = arguments((2, 4, 2, 32, 16))
    with FlopCounterMode(display=False) as ours:
        results(lambda *x: causal_attention(*x, 0.3), inputs, grad)
    assert ours.get_total_flops() == 7 * 2 * (2 * 4 * 32 * 32 * 16)  # two products forward, five backward


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the queries that our operation is called with."""
    calls: list[torch.Size] = []

    def see(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        calls.append(q.shape)
        return causal_attention(q, k, v, scale)

    monkeypatch.setattr("llmprune.models.attention.causal_attention", see)
    return calls


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi"])
def test_models_in_bfloat16_use_it_and_put_out_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, calls = tiny_model(family).bfloat16(), tokens(2, 24), counted(monkeypatch)
    exact = tiny_model(family).bfloat16().double()
    with torch.no_grad():
        theirs, right = model(ids).logits, exact(ids).logits
        with fast_attention():
            ours = model(ids).logits
    assert len(calls) == model.config.num_hidden_layers
    assert (ours.double() - right).norm() <= 1.5 * (theirs.double() - right).norm()


def test_what_is_not_plain_stays_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, padding, one token, dropout, and tokens beside a cache: bit for bit as without."""
    calls, ids = counted(monkeypatch), tokens(2, 8)
    half, full = tiny_model("llama").bfloat16(), tiny_model("llama")
    padded = torch.ones_like(ids)
    padded[0, 5:] = 0
    cases = [(full, ids, {}), (half, ids, {"attention_mask": padded}), (half, ids[:, :1], {})]

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            found = [model(given, **more).logits for model, given, more in cases]
            cache = half(ids[:, :1], use_cache=True).past_key_values
            return [*found, half(ids[:, 1:], past_key_values=cache).logits]

    before = outputs()
    with fast_attention():
        within = outputs()
        q, k, v = (x.detach() for x in arguments((1, 2, 2, 4, 8))[0])
        for how in ({"dropout": 0.5}, {"is_causal": False}, {"position_bias": torch.zeros(1, 2, 4, 4)}):
            AttentionInterface()["sdpa"](half.model.layers[0].self_attn, q, k, v, None, **how)
    assert calls == []
    assert all(torch.equal(a, b) for a, b in zip(before, within, strict=True))


def test_a_window_that_slides_is_ours_only_where_it_is_longer_than_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, model = counted(monkeypatch), tiny_model("mistral").bfloat16()
    window = model.config.sliding_window
    with torch.no_grad(), fast_attention():
        model(tokens(1, window))
        assert calls == []
        model(tokens(1, window - 1))
    assert len(calls) == model.config.num_hidden_layers


def test_transformers_own_comes_back() -> None:
    own = AttentionInterface()["sdpa"]

    def fail() -> None:
        with fast_attention(), fast_attention():
            assert AttentionInterface()["sdpa"] is not own
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert AttentionInterface()["sdpa"] is own
