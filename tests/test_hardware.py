"""Which dtype a run computes in, and how that is found out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from llmprune.base import hardware
from llmprune.base.errors import InputError
from llmprune.base.hardware import FASTER, bfloat16_products, pick_dtype  # imported before tests are kept from measuring

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("name", "device", "stored", "speed", "chosen", "why"), [
    ("auto", CPU, "bfloat16", FASTER, "bfloat16", "stored so, and its products are 1.5x as fast as float32's here"),
    ("auto", CPU, "bfloat16", 1.4, "float32", "bfloat16 products are 1.4x as fast here"),
    ("auto", CPU, "float16", 9.0, "float32", "stored in float16"),
    ("auto", CPU, "float32", 9.0, "float32", "stored so"),
    ("auto", CPU, None, 9.0, "float32", "stored so"),
    ("auto", GPU, "bfloat16", 0.1, "bfloat16", "stored so"),
    ("auto", GPU, "float16", 9.0, "float16", "stored so"),
    ("float32", CPU, "bfloat16", 9.0, "float32", ""),
    ("bfloat16", CPU, "float32", 0.1, "bfloat16", ""),
])  # fmt: skip
def test_which_dtype_and_why(
    name: str,
    device: torch.device,
    stored: str | None,
    speed: float,
    chosen: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "bfloat16_products", lambda: speed)
    assert pick_dtype(name, device, LlamaConfig(dtype=stored)) == (getattr(torch, chosen), why)


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown dtype 'bfloat'; did you mean bfloat16"):
        pick_dtype("bfloat", CPU, LlamaConfig())


def test_speed_is_measured_once_and_leaves_the_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: float32 products take 9 ms, those of bfloat16 3."""
    now, products = 0.0, list[torch.dtype]()

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 0.009 if a.dtype == torch.float32 else 0.003
        products.append(a.dtype)
        assert torch.get_num_threads() == 1
        return a

    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.Tensor, "__matmul__", multiply)
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: now))
    bfloat16_products.cache_clear()
    assert bfloat16_products() == bfloat16_products() == pytest.approx(3)
    bfloat16_products.cache_clear()
    assert products == [torch.float32, torch.bfloat16] * 3
    assert torch.get_num_threads() == threads


def test_real_products_have_a_speed() -> None:
    assert 0 < bfloat16_products() < float("inf")
