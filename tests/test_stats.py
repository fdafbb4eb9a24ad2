"""Statistics count tokens, and merge."""

from __future__ import annotations

import pytest
import torch

from llmprune.numerics.stats import CrossGram, Gram, InputSample, Moments

CPU = torch.device("cpu")


def inputs(tokens: int = 37, columns: int = 6) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cuts", [(37,), (1, 36), (10, 20, 7)])
def test_batches_of_any_size_weigh_their_tokens(cuts: tuple[int, ...]) -> None:
    x = inputs()
    gram, norm = Gram(6, CPU), Moments(6, CPU)
    for part in x.split(list(cuts)):
        gram.add(part)
        norm.add(part)
    torch.testing.assert_close(gram.mean(), x.T @ x / 37)
    torch.testing.assert_close(norm.rms(), x.square().mean(0).sqrt())
    torch.testing.assert_close(norm.rms().square(), gram.mean().diagonal())


@pytest.mark.parametrize("kind", [Gram, Moments])
def test_merging_equals_counting_all(kind: type) -> None:
    x = inputs()
    whole, a, b = kind(6, CPU), kind(6, CPU), kind(6, CPU)
    whole.add(x)
    a.add(x[:11])
    b.add(x[11:])
    a.merge(b)
    assert a.tokens == whole.tokens == 37
    merged, counted = (s.mean() if kind is Gram else s.rms() for s in (a, whole))
    torch.testing.assert_close(merged, counted)


@pytest.mark.parametrize("kind", [Gram, Moments])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_are_seen(kind: type, bad: float) -> None:
    statistic = kind(3, CPU)
    statistic.add(torch.tensor([[1.0, bad, 2.0]]))
    assert not statistic.finite()


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_sample_takes_every_nth_token_across_batches(stride: int) -> None:
    x = inputs()
    sample = InputSample(stride)
    for part in x.split([2, 20, 15]):
        sample.add(part)
    dense = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    pruned = dense.masked_fill(dense.abs() < 0.5, 0)
    taken = x[::stride]
    expected = (taken @ (dense - pruned).T).square().sum() / (taken @ dense.T).square().sum()
    lost, whole = sample.errors(dense, pruned)
    assert lost / whole == pytest.approx(float(expected), rel=1e-5)
    assert sample.errors(torch.zeros_like(dense), torch.zeros_like(dense)) == (0.0, 0.0)


def test_a_sample_keeps_no_batch_alive() -> None:
    """A view of the inputs would hold all of them: gigabytes at the width of a real model."""
    x, sample = inputs(400), InputSample(100)
    sample.add(x)
    assert sample.inputs().shape == (4, 6)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in sample._parts)


def test_cross_aims_at_what_the_dense_model_puts_out() -> None:
    """With the whole blend, least squares of the dense outputs on the pruned model's inputs; with none, the weights."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(400, 10, generator=generator)
    x, w = dense + 0.3 * torch.randn(400, 10, generator=generator), torch.randn(6, 10, generator=generator)
    gram, cross = Gram(10, CPU), CrossGram(10, CPU)
    for part in range(4):
        gram.add(x[part::4])
        cross.add(x[part::4], dense[part::4])
    assert cross.tokens == gram.tokens == 400
    assert torch.equal(cross.corrected_target(w, gram, 0.0), w)
    exact = torch.linalg.lstsq(x.double(), dense.double() @ w.double().T).solution.T
    aim = cross.corrected_target(w, gram, 1.0)
    torch.testing.assert_close(aim.double(), exact, rtol=0.02, atol=0.02)  # the damping's difference

    def lost(weight: torch.Tensor) -> float:
        return float((dense @ w.T - x @ weight.T).square().sum())

    assert lost(exact.float()) < lost(aim) * 1.0001 < lost(cross.corrected_target(w, gram, 0.5)) < 0.99 * lost(w)


def test_gram_serves_methods_that_ask_for_moments() -> None:
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(0)) + 0.5
    gram, moments = Gram(7, CPU), Moments(7, CPU)
    for stat in (gram, moments):
        stat.add(x[:100])
        stat.add(x[100:])
    for what in ("means", "rms", "variance"):
        torch.testing.assert_close(getattr(gram, what)(), getattr(moments, what)(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gram.variance(), x.var(0, correction=0))
