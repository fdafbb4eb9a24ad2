"""The damped inverse factor, against the textbook."""

from __future__ import annotations

import itertools

import pytest
import torch
import twins
from conftest import exact_refit

from llmprune.base.errors import InputError
from llmprune.numerics.linalg import inverse_factor, masked_least_squares, scaled


def gram(columns: int, tokens: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / tokens


def test_equals_explicit_inverse() -> None:
    h = gram(24, 100)
    factor = inverse_factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(24, dtype=h.dtype)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(damped))
    torch.testing.assert_close(factor.upper, factor.upper.triu())
    assert factor.damping == 0.01


def test_dead_inputs_neither_couple_nor_divide() -> None:
    h = gram(12, 50)
    h[3] = 0
    h[:, 3] = 0
    factor = inverse_factor(h)
    assert factor.dead.tolist() == [i == 3 for i in range(12)]
    assert torch.isfinite(factor.upper).all()
    others = [i for i in range(12) if i != 3]
    assert (factor.upper[3, others] == 0).all()
    assert (factor.upper[others, 3] == 0).all()


def test_damping_rises_in_recorded_steps() -> None:
    h = torch.eye(6) + 0.5 * (torch.ones(6, 6) - torch.eye(6))
    h[0, 1] = h[1, 0] = 1.5  # indefinite by about 0.5
    assert inverse_factor(h, 0.01).damping == pytest.approx(1.0)


def test_gives_up_with_an_error() -> None:
    with pytest.raises(InputError, match="not positive definite"):
        inverse_factor(torch.tensor([[1.0, 1e6], [1e6, 1.0]]))


@pytest.mark.parametrize(("value", "words"), [(0.0, "all zero"), (float("nan"), "not finite"), (float("inf"), "not finite")])
def test_rejects_what_is_no_gram(value: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        inverse_factor(torch.full((4, 4), value))


def test_badly_scaled_and_rank_deficient() -> None:
    scale = torch.logspace(-4, 4, 16)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * scale
    assert torch.isfinite(inverse_factor(x.T @ x / 5).upper).all()


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    w = torch.randn(rows, columns, generator=generator)
    return x / columns, w, torch.rand(rows, columns, generator=generator) > 0.5


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (7, 12), (5, 40)])
def test_masked_least_squares_equals_lstsq(rows: int, columns: int) -> None:
    x, w, mask = problem(rows, columns)
    fit = masked_least_squares(x.T @ x, w, mask, w, steps=400, tolerance=1e-7)
    torch.testing.assert_close(fit.weight.double(), exact_refit(w, x, mask), rtol=2e-2, atol=2e-2)
    assert (fit.weight[~mask] == 0).all()
    assert not torch.signbit(fit.weight[~mask]).any()


def test_batches_are_computed_as_if_one_by_one() -> None:
    problems = [problem(7, 20, seed) for seed in range(3)]
    grams, ws, masks = (torch.stack(parts) for parts in zip(*((x.T @ x, w, mask) for x, w, mask in problems), strict=True))
    grams[1, 4], grams[1, :, 4] = 0, 0
    units = scaled(grams, 0.01)
    fits = masked_least_squares(grams, ws, masks, ws, steps=6, tolerance=0.0)
    for index, gram in enumerate(grams):
        alone = scaled(gram, 0.01)
        torch.testing.assert_close(units.matrix[index], alone.matrix)
        torch.testing.assert_close(units.inverse(0.5)[index], alone.inverse(0.5))
        torch.testing.assert_close(units.into(ws)[index], alone.into(ws[index]))
        torch.testing.assert_close(alone.back(alone.into(ws[index]))[:, ~alone.dead], ws[index][:, ~alone.dead])
        fit = masked_least_squares(gram, ws[index], masks[index], ws[index], steps=6, tolerance=0.0)
        torch.testing.assert_close(fits.weight[index], fit.weight, rtol=1e-3, atol=1e-4)
    grams[2] = 0
    with pytest.raises(InputError, match="all zero"):
        scaled(grams)


def test_masked_least_squares_takes_its_twin_s_steps() -> None:
    """With inputs of one scale the preconditioner does nothing."""
    x, w, mask = problem(9, 40)
    h = x.T @ x
    h = h / h.diagonal().sqrt() / h.diagonal().sqrt()[:, None]
    for steps in (1, 3, 7):
        fit = masked_least_squares(h, w, mask, w, steps=steps, tolerance=0.0)
        torch.testing.assert_close(fit.weight, twins.refit(h.double(), w.double(), mask, steps).float(), rtol=1e-3, atol=1e-4)


def test_masked_least_squares_falls_and_stops() -> None:
    x, w, mask = problem(9, 40)
    h = x.T @ x

    def loss(weight: torch.Tensor) -> float:
        return float((x.double() @ (w - weight).double().T).square().sum())

    fits = [masked_least_squares(h, w, mask, w, steps=steps, tolerance=0.0) for steps in range(12)]
    losses = [loss(fit.weight) for fit in fits]
    assert losses[0] == pytest.approx(loss(w.masked_fill(~mask, 0)), rel=1e-5)
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert [fit.steps for fit in fits] == list(range(12))
    again = masked_least_squares(h, w, mask, fits[-1].weight, steps=50, tolerance=fits[-1].residual * 1.01)
    assert again.steps == 0, "it began where it should stop"


def test_masked_least_squares_leaves_dead_inputs() -> None:
    x, w, mask = problem(6, 12)
    x[:, 3], mask[:, 3] = 0, True
    fit = masked_least_squares(x.T @ x, w, mask, w)
    assert torch.equal(fit.weight[:, 3], w[:, 3])
    assert masked_least_squares(torch.zeros(12, 12), w, mask, w).steps == 0


def test_inverse_names_what_is_indefinite() -> None:
    with pytest.raises(InputError, match=r"not positive definite even with 0\.1"):
        scaled(torch.tensor([[1.0, 3.0], [3.0, 1.0]])).inverse(0.1)
