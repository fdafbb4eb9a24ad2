"""Which heads and neurons stay: against brute force, and against refitting each choice."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.numerics.linalg import DAMPING, kept_least_squares
from llmprune.numerics.stats import Gram
from llmprune.steps.structured.scores import SCORES
from llmprune.steps.structured.scores.base import Coupled, highest
from llmprune.steps.structured.scores.second_order import losses, rounds

CPU = torch.device("cpu")


def coupled(groups: int, width: int, seed: int = 0, bundles: int = 1, outputs: int = 5) -> tuple[Coupled, Tensor]:
    """Correlated inputs (tokens, groups * width), and what reads them."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * width
    x = torch.randn(400, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = Gram(columns, CPU)
    gram.add(x)
    consumer = torch.randn(outputs, columns, generator=generator)
    producers = [torch.randn(groups * rows, 7, generator=generator) for rows in (width, 2)]
    slope = (x * torch.randn(400, columns, generator=generator)).sum(0)
    return Coupled(consumer, producers, gram, x, groups, bundles, torch.rand(7, generator=generator), slope), x


def damped(gram: Tensor) -> Tensor:
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def refit_loss(w: Tensor, h: Tensor, kept: Tensor) -> float:
    """What is lost by the best weights on the kept inputs, in float64."""
    w, h = w.double(), h.double()
    best = torch.zeros_like(w)
    best[:, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ w.T).T
    return float((((w - best) @ h) * (w - best)).sum())


@pytest.mark.parametrize(("groups", "width"), [(6, 1), (5, 3)])
def test_second_order_loss_is_what_refitting_loses(groups: int, width: int) -> None:
    one, _ = coupled(groups, width)
    h = damped(one.gram.mean())
    columns = torch.arange(groups * width).view(groups, width)
    found = losses(one.consumer.double(), torch.linalg.inv(h.double()), columns)
    for group in range(groups):
        kept = torch.cat([columns[:group], columns[group + 1 :]]).flatten()
        assert float(found[group]) == pytest.approx(refit_loss(one.consumer, h, kept), rel=1e-6)


@pytest.mark.parametrize(("groups", "width", "bundles"), [(12, 1, 1), (6, 2, 2)])
def test_rounds_add_up_to_what_refitting_loses(groups: int, width: int, bundles: int) -> None:
    one, _ = coupled(groups, width, bundles=bundles)
    exact = Coupled(one.consumer.double(), one.producers, double(one.gram), one.inputs, groups, bundles)
    h, columns = damped(exact.gram.mean()), torch.arange(groups * width).view(groups, width)
    gone, lost = torch.zeros(groups, dtype=torch.bool), 0.0
    for going, more in rounds(exact, 2):
        gone[going] = True
        lost += more
        assert lost == pytest.approx(refit_loss(one.consumer, h, columns[~gone].flatten()), rel=1e-6)
    assert int(gone.sum()) == groups - 2


def double(gram: Gram) -> Gram:
    gram.sum = gram.sum.double()
    return gram


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("groups", "width"), [(8, 1), (6, 2)])
def test_second_order_comes_near_the_best_choice(groups: int, width: int, seed: int) -> None:
    """Of all choices of half the groups, greedy is within a third of the best, and no other score is much better."""
    one, _ = coupled(groups, width, seed)
    h, columns = damped(one.gram.mean()), torch.arange(groups * width).view(groups, width)
    best = min(
        refit_loss(one.consumer, h, columns[list(kept)].flatten())
        for kept in itertools.combinations(range(groups), groups // 2)
    )
    lost = {
        name: refit_loss(one.consumer, h, columns[SCORES.get(name).select(one, groups // 2)].flatten())
        for name in SCORES.names()
    }
    assert lost["second_order"] <= 1.34 * best
    assert lost["second_order"] <= 1.1 * min(loss for name, loss in lost.items() if name != "second_order")


@pytest.mark.parametrize("name", SCORES.names())
@pytest.mark.parametrize(("groups", "width", "bundles", "keep"), [(40, 1, 1, 29), (8, 4, 4, 4), (6, 3, 1, 1), (5, 2, 1, 5)])
def test_exact_counts_in_order(name: str, groups: int, width: int, bundles: int, keep: int) -> None:
    one, _ = coupled(groups, width, bundles=bundles)
    kept = SCORES.get(name).select(one, keep)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == keep
    assert set((kept // (groups // bundles)).bincount(minlength=bundles).tolist()) == {keep // bundles}


@pytest.mark.parametrize("name", SCORES.names())
def test_a_group_that_is_never_read_or_made_goes_first(name: str) -> None:
    one, x = coupled(6, 2)
    gone = [2, 3, 8, 9]
    x[:, gone] = 0
    gram = Gram(12, CPU)
    gram.add(x)
    for matrix in one.producers:
        matrix.view(6, -1)[[1, 4]] = 0
    one.consumer[:, gone] = 0
    slope = torch.ones(12).index_fill(0, torch.tensor(gone), 0)
    kept = SCORES.get(name).select(Coupled(one.consumer, one.producers, gram, x, 6, 1, one.gain, slope), 4)
    assert kept.tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("name", ["second_order", "output", "activation", "absolute", "zeros", "fluctuation"])
def test_inputs_that_are_never_active_go_before_weak_ones(name: str) -> None:
    """A dead ReLU's column of weights says nothing, however large it is."""
    one, x = coupled(6, 1)
    x[:, 2] = 0
    gram = Gram(6, CPU)
    gram.add(x)
    one.consumer[:, 2], one.consumer[:, 4] = 10, 0.5 * one.consumer[:, 4]
    assert 2 not in SCORES.get(name).select(Coupled(one.consumer, one.producers, gram, x, 6), 5).tolist()


def test_zeros_counts_tokens_and_absolute_adds_them_up() -> None:
    """One input is large but rare, one small but never silent."""
    one, x = coupled(3, 1)
    x[:, 0], x[:, 1], x[:, 2] = 0, 0.5, 1
    x[::8, 0] = 6
    kept = {
        name: SCORES.get(name).select(Coupled(torch.ones(3, 3), one.producers, one.gram, x, 3), 1).tolist()
        for name in ("zeros", "absolute")
    }
    assert kept == {"zeros": [1], "absolute": [2]}
    assert SCORES.get("zeros").select(Coupled(torch.ones(3, 3), one.producers, one.gram, x, 3), 2).tolist() == [1, 2]


def test_scaling_counts_the_gain() -> None:
    one, _ = coupled(4, 1)
    producer = torch.diag(torch.tensor([2.0, 2.0, 1.0, 2.0]))
    found = []
    for gain in (None, torch.tensor([1.0, 1.0, 9.0, 0.1]), torch.tensor([1.0, 9.0, 1.0, 1.0])):
        known = Coupled(torch.ones(3, 4), [producer], one.gram, one.inputs, 4, gain=gain)
        found.append(SCORES.get("scaling").select(known, 3).tolist())
    assert found == [[0, 1, 3], [0, 1, 2], [0, 1, 3]]


def test_fluctuation_spares_what_varies_not_what_is_large() -> None:
    one, x = coupled(4, 1)
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 100 + 0.01 * x[:, 0]
    gram = Gram(4, CPU)
    gram.add(x)
    same = Coupled(torch.ones(3, 4), one.producers, gram, x, 4)
    assert 0 not in SCORES.get("fluctuation").select(same, 3).tolist()
    assert 0 in SCORES.get("activation").select(same, 1).tolist()


def test_regression_is_least_squares() -> None:
    one, x = coupled(12, 1)
    kept = torch.tensor([0, 3, 4, 7, 11])
    target = one.consumer + 0.1
    exact = torch.linalg.lstsq(x[:, kept].double(), x.double() @ target.double().T).solution.T
    gram = one.gram.mean().double() * 1.0
    found = kept_least_squares(gram, target.double(), one.consumer.double(), kept)

    def lost(w: Tensor) -> float:
        full = torch.zeros(5, 12, dtype=torch.float64)
        full[:, kept] = w
        return float(((x.double() @ (full - target.double()).T) ** 2).sum())

    assert lost(exact) <= lost(found) <= 1.02 * lost(exact)
    assert lost(found) < 0.9 * lost(one.consumer.double()[:, kept])


def test_all_columns_and_their_own_target_change_nothing() -> None:
    one, _ = coupled(6, 1)
    same = kept_least_squares(one.gram.mean(), one.consumer, one.consumer, torch.arange(6))
    assert torch.equal(same, one.consumer)


def test_ties_keep_the_first() -> None:
    assert highest(torch.ones(6), 4, 2).tolist() == [0, 1, 3, 4]


def test_an_unknown_score_lists_near_ones() -> None:
    with pytest.raises(InputError, match="did you mean fluctuation"):
        SCORES.get("fluctuations")
