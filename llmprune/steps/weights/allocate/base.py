"""The protocol of an allocation, and what several of them need: the levels a matrix can have, and exact counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmprune.base.errors import InputError
from llmprune.job.scan import Allocation, Scan, Scanned, total_weights
from llmprune.numerics.patterns import NM, Pattern, Unstructured

REACH = 0.15  # a matrix may be so much sparser or denser than all together
STEP = 0.01  # between two sparsities that it may have
STRIDE = 0.05  # the same where matrices are tried as they were solved
_MASK = 1 / 16  # of a 16-bit weight: the bit that says whether it is kept

Measured = Callable[[Sequence[Allocation], int], list[float]]  # nats a token, of each, on so many tokens; see `levels`


@dataclass(frozen=True, slots=True)
class Trials:
    """What an allocator that looks for the best by trying is given besides a scan.

    Attributes:
        measured: KL divergence from the dense model of models whose matrices have any of `levels` at `STRIDE`.
        seed: of what is drawn at random.
        known: what `keep` was last told by an earlier, unfinished run; empty at first.
        keep: is told what is found so far (JSON), and says whether there is time to go on.
    """

    measured: Measured
    seed: int
    known: Mapping[str, Any]
    keep: Callable[[Mapping[str, Any]], bool]


class Allocator(Protocol):
    """Every module in this package, `base` aside, is one: a pure function of what a scan has measured and, for one that sets
    `measures` to True, of what trials show.
    """

    def allocate(self, scan: Scan, pattern: Pattern, trials: Trials | None = None) -> Allocation:
        """Patterns that come to exactly what `pattern` everywhere would: as many weights dropped or, where it is N:M, at most
        as many bytes.

        Raises:
            InputError: there is no such.
        """
        ...


def levels(one: Scanned, pattern: Pattern, step: float = STEP) -> list[Pattern | None]:
    """The patterns that a matrix may have where all together have `pattern`, the one that keeps most first: sparsities `step`
    apart. N:M may be finer or coarser (2:4: dense, 6:8, 2:4, 1:4), where the matrix is wide enough for it."""
    if isinstance(pattern, NM):
        n, m = pattern.n, pattern.m
        finer, coarser = NM(n + m, 2 * m), NM(n, 2 * m) if n % 2 else NM(n // 2, m)
        fit = [own for own in (finer, pattern, coarser) if not own.misfit(one.rows, one.columns)]
        return [None, *fit]
    assert isinstance(pattern, Unstructured)
    steps = round(REACH / step)
    wanted = [round(pattern.sparsity + step * number, 6) for number in range(-steps, steps + 1) if number]
    found = [pattern, *(Unstructured(own) for own in wanted if STEP <= own <= 1 - STEP)]
    return [*sorted(found, key=lambda own: own.sparsity)]


def grid(pattern: Pattern, *, searched: bool = False) -> list[Pattern]:
    """The patterns at which errors must be known to spread `pattern` or, where matrices are tried, what they may become."""
    wide = Scanned("", 0, "", 1, 1, 2 * pattern.m if isinstance(pattern, NM) else 1, {}, 0.0, 0.0)
    return [own for own in levels(wide, pattern, STRIDE if searched else REACH) if own is not None]


def share(pattern: Pattern | None) -> float:
    """What is left of a weight: the chance that it is kept or, of N:M, bytes of a 16-bit one with the bit that says so."""
    if pattern is None:
        return 1.0
    if isinstance(pattern, NM):
        return pattern.n / pattern.m + _MASK
    assert isinstance(pattern, Unstructured)
    return 1 - pattern.sparsity


def exact(matrices: Sequence[Scanned], sparsities: Mapping[str, float], pattern: Unstructured) -> dict[str, Pattern | None]:
    """Sparsities that drop exactly as many weights as `pattern` in every matrix would: what rounding leaves over goes to the
    largest matrices.

    Raises:
        InputError: that would drop none or all of some matrix.
    """
    wanted = sum(one.sites * round(pattern.sparsity * one.rows * one.columns) for one in matrices)
    drops = {one.name: round(sparsities[one.name] * one.rows * one.columns) for one in matrices}
    left = wanted - sum(one.sites * drops[one.name] for one in matrices)
    for one in sorted(matrices, key=lambda one: (-one.weights, one.name)):
        more = int(left / one.sites)  # towards zero; a pool's matrices all drop as many
        drops[one.name] += more
        left -= more * one.sites
    if any(not 0 < drops[one.name] < one.rows * one.columns for one in matrices):
        raise InputError(f"{pattern} cannot be spread over these matrices: ask for less")
    return {one.name: Unstructured(drops[one.name] / (one.rows * one.columns)) for one in matrices}


def mean_sparsity(matrices: Sequence[Scanned], sparsities: Mapping[str, float]) -> float:
    """Over all weights."""
    return sum(one.weights * sparsities[one.name] for one in matrices) / total_weights(matrices)
