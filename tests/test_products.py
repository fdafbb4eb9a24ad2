"""Products of bfloat16 values on a CPU: exact but for the sums, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmprune.numerics import products
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


@pytest.fixture
def asked_anew() -> Iterator[None]:
    products._sums_in_float32.cache_clear()
    yield
    products._sums_in_float32.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_sums_products_of_16_bit_inputs_in_float32(
    dtype: torch.dtype, asked_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's kernels for a GPU do, which none here has: no float32 copy of the inputs reaches them."""
    plain, dtypes = torch.addmm, []

    def summed(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, out: torch.Tensor) -> None:
        dtypes.append((a.dtype, b.dtype))
        assert out_dtype == total.dtype == torch.float32
        plain(total, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "addmm", summed)
    x, dense = inputs(1, dtype), inputs(2, dtype)
    gram, cross = Gram(96, CPU), CrossGram(96, CPU)
    gram.add(x)
    cross.add(x, dense)
    assert dtypes == 3 * [(dtype, dtype)]  # once to find out
    assert off(gram.sum, x.double().T @ x.double()) < 1e-6
    assert off(cross.sum, dense.double().T @ x.double()) < 1e-6
    torch.testing.assert_close(gram.means(), x.float().mean(0))
    cross.add(x, dense.float())
    assert len(dtypes) == 3, "one of the two is float32"


@pytest.mark.parametrize("error", [NotImplementedError, TypeError])
def test_where_torch_cannot_it_is_asked_once(error: type[Exception], asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(*args: object, **kwargs: object) -> None:
        asked.append(args)
        raise error

    monkeypatch.setattr(torch, "addmm", fail)
    x, gram = inputs(1, torch.bfloat16), Gram(96, CPU)
    for part in x.split(300):
        gram.add(part)
    assert len(asked) == 1
    assert off(gram.sum, x.double().T @ x.double()) < 5e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grams_on_a_gpu_are_exact_to_float32(dtype: torch.dtype) -> None:
    x, dense = (inputs(seed, dtype).cuda() for seed in (1, 2))
    gram, cross = Gram(96, x.device), CrossGram(96, x.device)
    assert products.factor(x) is x
    gram.add(x)
    cross.add(x, dense)
    assert off(gram.sum, x.double().T @ x.double()) < 5e-6
    assert off(cross.sum, dense.double().T @ x.double()) < 5e-6
