"""Every way of rounding a matrix to a grid, against brute force and naive twins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmprune.base.notation import BITS
from llmprune.numerics.codes import pack, unpack, words
from llmprune.numerics.linalg import DAMPING, inverse_factor, scaled
from llmprune.numerics.stats import Gram
from llmprune.steps.quantise.alternation import alternated
from llmprune.steps.quantise.descent import descended
from llmprune.steps.quantise.feedback import fed_back
from llmprune.steps.quantise.grid import Grid, Quantised
from llmprune.steps.quantise.loss import row_losses
from llmprune.steps.quantise.rounding import ROUNDINGS
from llmprune.steps.quantise.scales import fitted, largest, searched

ROWS, COLUMNS = 24, 64


def inputs(columns: int = COLUMNS, tokens: int = 400, seed: int = 0) -> Gram:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    gram = Gram(columns, torch.device("cpu"))
    gram.add(torch.randn(tokens, columns, generator=generator) @ mixing)
    return gram


def weights(kept_share: float | str, rows: int = ROWS, columns: int = COLUMNS, seed: int = 1) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    if kept_share == 1:
        return w, None
    if kept_share == "2:4":
        order = w.abs().view(rows, -1, 4).argsort(-1, descending=True)
        kept = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(-1, order[..., :2], True).view(rows, columns)
    else:
        kept = torch.rand(rows, columns, generator=generator) < kept_share
    return w * kept, kept


def lost(found: Quantised, target: Tensor, gram: Gram) -> float:
    gap = (found.weight() - target).double()
    return float(((gap @ gram.mean().double()) * gap).sum())


@pytest.mark.parametrize("name", ROUNDINGS.names())
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kept_share", [1, "2:4", 0.3, 0.02])
@pytest.mark.parametrize("group", [16, COLUMNS])
def test_the_contract(name: str, bits: int, kept_share: float | str, group: int) -> None:
    (w, kept), gram, grid = weights(kept_share), inputs(), Grid(bits, group, torch.bfloat16)
    before = w.clone()
    found = ROUNDINGS.get(name).quantise(w, kept, gram, grid)
    assert torch.equal(w, before)
    assert found.codes.shape == w.shape
    assert found.scales.shape == (ROWS, COLUMNS // group)
    assert torch.equal(found.codes, found.codes.round())
    assert int(found.codes.min()) >= -(2 ** (bits - 1))
    assert int(found.codes.max()) < 2 ** (bits - 1)
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    assert bool((found.scales > 0).all())
    assert kept is None or not bool(found.codes[~kept].any())
    halves = [
        ROUNDINGS.get(name).quantise(w[own], None if kept is None else kept[own], gram, grid)
        for own in (slice(0, 8), slice(8, ROWS))
    ]
    apart = torch.cat([half.weight() for half in halves])
    assert torch.allclose(apart, found.weight(), atol=1e-5)  # rows do not bear on each other


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kept_share", [1, "2:4", 0.3])
def test_each_way_is_better_than_the_one_before(bits: int, kept_share: float | str) -> None:
    (w, kept), gram, grid = weights(kept_share), inputs(), Grid(bits, 16, torch.float32)
    losses = [lost(ROUNDINGS.get(name).quantise(w, kept, gram, grid), w, gram) for name in ("nearest", "gptq", "refined")]
    assert losses[2] < 0.95 * losses[1] < losses[0]


def test_round_to_nearest_is_the_plain_formula() -> None:
    (w, kept), grid = weights(0.5), Grid(4, 16, torch.float32)
    found = ROUNDINGS.get("nearest").quantise(w, kept, inputs(), grid)
    for row, group in itertools.product(range(ROWS), range(4)):
        own = w[row, 16 * group : 16 * group + 16]
        scale = own.abs().max() / 7
        assert torch.allclose(found.weight()[row, 16 * group : 16 * group + 16], (own / scale).round() * scale, atol=1e-6)


def test_feedback_is_the_naive_sweep() -> None:
    """One column at a time, the inverse of what is left taken anew each time (Frantar et al., 2022)."""
    (w, kept), gram, grid = weights(0.6), inputs(), Grid(4, 32, torch.float32)
    assert kept is not None
    h = gram.mean().double()
    h += DAMPING * h.diagonal().mean() * torch.eye(COLUMNS)
    left, codes = w.double().clone(), torch.zeros(ROWS, COLUMNS)
    for j in range(COLUMNS):
        if j % 32 == 0:
            scale = (left * kept)[:, j : j + 32].abs().amax(-1) / 7
        inverse = torch.linalg.inv(h[j:, j:])
        codes[:, j] = ((left[:, j] / scale).round().clamp(-8, 7) * kept[:, j]).float()
        gap = left[:, j] - codes[:, j] * scale
        left[:, j:] -= torch.outer(gap / inverse[0, 0], inverse[0])
    found = fed_back(w, kept, inverse_factor(gram.mean()).upper, grid, lambda own, mask, _: largest(own, mask, grid))
    assert float((found.codes == codes).float().mean()) > 0.98  # float32 beside float64, at the edge of two codes


def test_descent_ends_where_no_code_can_be_better() -> None:
    (w, kept), gram, grid = weights(0.5, rows=4, columns=16), inputs(16), Grid(3, 16, torch.float32)
    assert kept is not None
    start = ROUNDINGS.get("nearest").quantise(w, kept, gram, grid)
    found = descended(start, kept, w, gram.mean(), sweeps=50)
    least = row_losses(found, w, gram.mean())
    assert bool((least <= row_losses(start, w, gram.mean()) + 1e-5).all())
    for row, column in kept.nonzero().tolist():
        for code in range(grid.least, grid.most + 1):
            other = found.codes.clone()
            other[row, column] = code
            assert row_losses(Quantised(grid, other, found.scales), w, gram.mean())[row] >= least[row] - 1e-4


def test_refinement_comes_near_the_best_codes_there_are() -> None:
    """Of all codes of five weights at the same scale, by trying all."""
    gram, grid = inputs(5), Grid(3, 5, torch.float32)
    every = torch.tensor(list(itertools.product(range(grid.least, grid.most + 1), repeat=5)), dtype=torch.float32)
    ratios = []
    for seed in range(10):
        w, _ = weights(1, rows=1, columns=5, seed=seed)
        found = ROUNDINGS.get("refined").quantise(w, None, gram, grid)
        unit = scaled(gram.mean(), DAMPING)
        damped = unit.matrix * unit.scale * unit.scale[:, None]
        same = Quantised(grid, every, found.scales.expand(len(every), 1))
        best = float(row_losses(same, w.expand(len(every), 5), damped).min())
        ratios.append(float(row_losses(found, w, damped)) / best)
    assert min(ratios) > 1 - 1e-4
    assert sum(ratios) / len(ratios) < 1.3


def test_scales_by_least_squares_are_the_best_there_are() -> None:
    (w, kept), gram, grid = weights(0.5), inputs(), Grid(4, 16, torch.float32)
    start = ROUNDINGS.get("nearest").quantise(w, kept, gram, grid)
    found, h = fitted(start, w, gram.mean()), gram.mean()
    least = row_losses(found, w, h)
    assert bool((least <= row_losses(start, w, h)).all())
    for group, factor in itertools.product(range(4), (0.99, 1.01)):
        scales = found.scales.clone()
        scales[:, group] *= factor
        assert bool((row_losses(Quantised(grid, found.codes, scales), w, h) >= least * (1 - 1e-4)).all())


def test_alternation_never_raises_the_loss() -> None:
    for kept_share, bits in itertools.product((1, "2:4"), BITS):
        (w, kept), gram, grid = weights(kept_share), inputs(), Grid(bits, 16, torch.bfloat16)
        start = ROUNDINGS.get("gptq").quantise(w, kept, gram, grid)
        unit = scaled(gram.mean(), DAMPING)
        damped = unit.matrix * unit.scale * unit.scale[:, None]
        found = alternated(start, kept, w, damped, unit)
        assert bool((row_losses(found, w, damped) <= row_losses(start, w, damped)).all())


@pytest.mark.parametrize("name", ROUNDINGS.names())
def test_what_is_hard_to_scale(name: str) -> None:
    """A group of zeros, a row of zeros, inputs that are never seen, weights that float16 hardly holds."""
    (w, kept), gram = weights(0.5), inputs()
    assert kept is not None
    w[0], kept[0], w[1, :16], kept[1, :16] = 0, False, 0, False
    gram.sum[:, 3] = gram.sum[3] = 0
    w[2] *= 1e-7
    found = ROUNDINGS.get(name).quantise(w, kept, gram, Grid(4, 16, torch.float16))
    assert bool(torch.isfinite(found.weight()).all())
    assert not bool(found.codes[0].any())
    assert not bool(found.codes[1, :16].any())


def test_the_search_finds_the_best_of_its_shares() -> None:
    (w, kept), grid, importance = weights(0.5, columns=16), Grid(3, 16, torch.float32), torch.rand(16)
    assert kept is not None
    found = searched(w, kept, importance, grid)
    whole = w.abs().amax(-1) / 3

    def error(scale: Tensor) -> Tensor:
        return (((w / scale[:, None]).round().clamp(-4, 3) * scale[:, None] * kept - w).square() * importance).sum(-1)

    assert all(bool((error(found) <= error(whole * (1 - 0.05 * step)) + 1e-6).all()) for step in range(13))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 17, 32, 704])
def test_codes_are_packed_as_compressed_tensors_packs_them(bits: int, columns: int) -> None:
    """Read bit by bit as the format is described: code i of a row from bit i * bits on, 2^(bits-1) added."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, words(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    for row in range(3):
        stream = sum((int(word) % 2**32) << (32 * place) for place, word in enumerate(packed[row].tolist()))
        assert [((stream >> (bits * i)) % 2**bits) - 2 ** (bits - 1) for i in range(columns)] == codes[row].tolist()
