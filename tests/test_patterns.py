"""Patterns: parsing, exact counts, proof."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.base.errors import InputError
from llmprune.numerics.patterns import _SAMPLE, NM, Pattern, Stacked, Unstructured, parse, verify

fractions = st.floats(0.01, 0.99)
pairs = st.integers(2, 12).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def scores(rows: int, columns: int, seed: int, levels: int) -> torch.Tensor:
    """Few levels make many ties."""
    return torch.randint(0, levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_unstructured_round_trip(sparsity: float) -> None:
    """What a record holds reads back exactly, or a sound matrix could fail its own verification."""
    assert parse(str(sparsity)) == parse(str(Unstructured(sparsity))) == Unstructured(sparsity)


@given(pairs)
def test_nm_round_trip(pair: tuple[int, int]) -> None:
    assert parse(str(NM(*pair))) == NM(*pair)


@pytest.mark.parametrize(("text", "pattern"), [("50%", Unstructured(0.5)), (" 2:4 ", NM(2, 4)), (0.6, Unstructured(0.6))])
def test_parse_reads(text: str | float, pattern: Pattern) -> None:
    assert parse(text) == pattern


BAD = ["4:2", "0:4", "4:4", "-1", "1.5", "0", "1", "nan", "inf", "abc", "", "2:", ":4", "2:4:8", "-2:4", "2.0:4", "100%", "%"]


@pytest.mark.parametrize("text", BAD)
def test_parse_rejects(text: str) -> None:
    with pytest.raises(InputError):
        parse(text)


def test_parse_suggests_percent() -> None:
    with pytest.raises(InputError, match="did you mean 50%"):
        parse("50")


@given(st.text(max_size=8))
def test_parse_never_crashes(text: str) -> None:
    try:
        pattern = parse(text)
    except InputError:
        return
    assert isinstance(pattern, (Unstructured, NM))


@given(fractions, st.integers(1, 9), st.integers(1, 17), st.integers(0, 5), st.integers(1, 4))
def test_unstructured_counts_are_exact(s: float, rows: int, columns: int, seed: int, levels: int) -> None:
    score, pattern = scores(rows, columns, seed, levels), Unstructured(s)
    for mask in (pattern.keep(score), pattern.keep_rows(score)):
        assert int((~mask).sum()) == round(s * rows * columns)
    dropped = (~pattern.keep_rows(score)).sum(1)
    assert int(dropped.max() - dropped.min()) <= 1


@given(fractions, st.integers(1, 9), st.integers(2, 17), st.integers(1, 6))
def test_slices_add_up(s: float, rows: int, columns: int, width: int) -> None:
    score, pattern = scores(rows, columns, 0, 3), Unstructured(s)
    dropped = sum(int((~pattern.keep(score[:, lo : lo + width], start=lo * rows)).sum()) for lo in range(0, columns, width))
    assert dropped == round(s * rows * columns)


@given(fractions | pairs, st.integers(1, 5))
def test_stacked_matrices_have_the_pattern_each(chosen: float | tuple[int, int], width: int) -> None:
    pattern: Pattern = NM(*chosen) if isinstance(chosen, tuple) else Unstructured(chosen)
    stacked, score = Stacked(pattern, (2, 5, 1)), scores(8, 4 * pattern.period, 0, 3)
    parts = score.split(stacked.rows)
    assert torch.equal(stacked.keep(score), torch.cat([pattern.keep(part) for part in parts]))
    assert torch.equal(stacked.keep_rows(score), torch.cat([pattern.keep_rows(part) for part in parts]))
    lo = width % 4 * pattern.period  # a slice of columns, as SparseGPT chooses them
    slices = [pattern.keep(part[:, lo:], start=lo * len(part)) for part in parts]
    assert torch.equal(stacked.keep(score[:, lo:], start=lo * 8), torch.cat(slices))
    kept = torch.ones_like(score).masked_fill(~stacked.keep(score), 0)
    assert stacked.violation(kept) is None
    assert stacked.misfit(*score.shape) == next((w for p in parts if (w := pattern.misfit(*p.shape))), None)


@given(pairs, st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_nm_counts_are_exact(pair: tuple[int, int], rows: int, groups: int, levels: int) -> None:
    n, m = pair
    score = scores(rows, groups * m, 1, levels)
    mask = NM(n, m).keep(score)
    assert torch.equal(mask.unflatten(1, (-1, m)).sum(-1), torch.full((rows, groups), n))
    kept, dropped = score.masked_fill(~mask, float("inf")), score.masked_fill(mask, float("-inf"))
    assert bool((kept.unflatten(1, (-1, m)).amin(-1) >= dropped.unflatten(1, (-1, m)).amax(-1)).all())


@given(fractions, st.integers(0, 5))
def test_unstructured_keeps_the_highest(s: float, seed: int) -> None:
    score = torch.rand(7, 11, generator=torch.Generator().manual_seed(seed))
    mask = Unstructured(s).keep(score)
    if mask.any() and not mask.all():
        assert score[mask].min() > score[~mask].max()


def large(kind: str) -> torch.Tensor:
    """Enough scores that a sample of them places the threshold; evenly spaced, it may mislead."""
    noise = torch.rand(300, 500, generator=torch.Generator().manual_seed(0))
    stride = torch.arange(noise.numel()).view(noise.shape) % (noise.numel() // _SAMPLE)
    return {"plain": noise, "few levels": (4 * noise).floor(), "sorted": noise.flatten().sort().values.view(noise.shape),
            "misleading": noise + (stride == 0), "all equal": torch.ones_like(noise)}[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "few levels", "sorted", "misleading", "all equal"])
@pytest.mark.parametrize("s", [0.0001, 0.05, 0.5, 0.7, 0.9999])
def test_large_matrices_are_cut_where_a_sort_cuts(kind: str, s: float) -> None:
    score = large(kind)
    drop = round(s * score.numel())
    order = score.flatten().sort(descending=True, stable=True).indices  # of scores that tie, the first stay
    expected = torch.ones(score.numel(), dtype=torch.bool).scatter(0, order[score.numel() - drop :], False)
    assert torch.equal(Unstructured(s).keep(score).flatten(), expected)


@given(pairs, st.integers(0, 3))
def test_verify_finds_one_weight_too_many(pair: tuple[int, int], row: int) -> None:
    n, m = pair
    weight = torch.ones(4, 3 * m).masked_fill(~NM(n, m).keep(torch.rand(4, 3 * m)), 0)
    verify(weight, NM(n, m))
    group = weight[row, m : 2 * m]
    group[(group == 0).nonzero()[0]] = -1.0
    with pytest.raises(ValueError, match=f"row {row}, columns {m} to {2 * m - 1}: {n + 1} nonzeros"):
        verify(weight, NM(n, m))


def test_verify_unstructured_and_odd_columns() -> None:
    weight = torch.tensor([[0.0, 1.0, -0.0, 3.0]])
    verify(weight, Unstructured(0.5))
    with pytest.raises(ValueError, match="2 zeros of 4"):
        verify(weight, Unstructured(0.75))
    with pytest.raises(ValueError, match="not a multiple of 3"):
        verify(weight, NM(1, 3))


def test_misfits() -> None:
    assert NM(2, 4).misfit(3, 8) is None
    assert "not a multiple of 4" in str(NM(2, 4).misfit(3, 9))
    assert Unstructured(0.5).misfit(1, 2) is None
    for sparsity in (1e-9, 1 - 1e-9):
        assert "none or all of its 64 weights" in str(Unstructured(sparsity).misfit(8, 8))
