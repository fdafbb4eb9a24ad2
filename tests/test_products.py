"""Products of bfloat16 values on a CPU: exact but for the sums, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from llmprune.numerics.products import bfloat16_products
from llmprune.numerics.stats import CrossGram, Gram

CPU = torch.device("cpu")
SETTING = getattr(torch.backends.mkldnn, "matmul", None)


def inputs(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1024, 96, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_grams_of_bfloat16_inputs_are_exact_to_float32() -> None:
    x, dense = inputs(1, torch.bfloat16), inputs(2, torch.bfloat16)
    gram, cross = Gram(96, CPU), CrossGram(96, CPU)
    gram.add(x)
    cross.add(x, dense)
    assert off(gram.sum, x.double().T @ x.double()) < 5e-6
    assert off(cross.sum, dense.double().T @ x.double()) < 5e-6
    torch.testing.assert_close(gram.means(), x.float().mean(0))


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_float32_inputs_are_counted_as_ever(other: torch.dtype) -> None:
    """Bit for bit, and so is a product of one float32 and one bfloat16 operand."""
    x, dense = inputs(1, torch.float32), inputs(2, other)
    gram, cross = Gram(96, CPU), CrossGram(96, CPU)
    gram.add(x)
    cross.add(x, dense)
    assert torch.equal(gram.sum, torch.zeros(96, 96).addmm_(x.T, x))
    assert torch.equal(cross.sum, torch.zeros(96, 96).addmm_(dense.float().T, x))


@pytest.mark.skipif(SETTING is None, reason="this torch has no such setting")
def test_the_setting_is_put_back() -> None:
    before, x = SETTING.fp32_precision, inputs(1, torch.bfloat16)

    def fail() -> None:
        with bfloat16_products(x):
            with bfloat16_products(x, x):
                assert SETTING.fp32_precision == "bf16"
            assert SETTING.fp32_precision == "bf16"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert SETTING.fp32_precision == before
    with bfloat16_products(x, x.float()):
        assert SETTING.fp32_precision == before


def test_a_torch_without_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "mkldnn", object())
    x = inputs(1, torch.bfloat16)
    gram = Gram(96, CPU)
    gram.add(x)
    assert off(gram.sum, x.double().T @ x.double()) < 5e-6
