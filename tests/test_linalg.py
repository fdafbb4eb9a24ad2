"""The damped inverse factor, against the textbook."""

from __future__ import annotations

import pytest
import torch

from llmprune.errors import InputError
from llmprune.linalg import inverse_factor


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
