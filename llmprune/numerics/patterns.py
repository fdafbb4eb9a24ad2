"""Sparsity patterns as value objects: which weights of a matrix may stay.

`NM(n, m)` *keeps* n of every m consecutive inputs of a row (2:4 is what sparse tensor cores accelerate; Mishra et al.,
"Accelerating Sparse Deep Neural Networks", 2021). `Unstructured(s)` drops the fraction s anywhere. Counts are exact,
ties included: a threshold comparison would drop every weight that ties with the last one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmprune.base.notation import check_fraction, check_ratio, read_sparsity, sparsity_text
from llmprune.base.words import count


class Pattern(Protocol):
    """What a solver asks of a pattern. Scores and masks are (out, in); True in a mask means kept.

    `keep` also takes several matrices at once, (batch, out, in), each with the pattern.
    """

    @property
    def period(self) -> int:
        """Columns are decided in groups of this many."""
        ...

    @property
    def rowwise(self) -> bool:
        """Whether each row is decided on its own."""
        ...

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why no (rows, columns) matrix can have the pattern, or None."""
        ...

    def keep(self, score: Tensor, *, start: int = 0) -> Tensor:
        """Mask of the highest scores, chosen over the whole of `score`.

        `start` is the number of weights already decided, so that slices of one matrix add up to its exact count.
        """
        ...

    def keep_rows(self, score: Tensor) -> Tensor:
        """Mask of the highest scores, each row compared on its own."""
        ...

    def violation(self, weight: Tensor) -> str | None:
        """Where `weight` (out, in) breaks the pattern, or None. Zeros beyond the pattern are allowed."""
        ...


_SMALL_GROUP = 16  # up to this, comparing all pairs of a group is faster than topk
_SAMPLE = 2**14  # scores that a threshold is estimated from


@dataclass(frozen=True, slots=True)
class Unstructured:
    """Drop the fraction `sparsity` (0 < s < 1) of the weights, anywhere: exactly `round(s * count)` of them."""

    sparsity: float
    period: ClassVar[int] = 1
    rowwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fraction(self.sparsity)

    def __str__(self) -> str:
        return sparsity_text(self.sparsity)

    def misfit(self, rows: int, columns: int) -> str | None:
        size = rows * columns
        return None if 0 < round(self.sparsity * size) < size else f"it would drop none or all of its {count(size, 'weight')}"

    def keep(self, score: Tensor, *, start: int = 0) -> Tensor:
        if score.ndim > 2:
            return torch.stack([self.keep(own, start=start) for own in score])
        drop = round(self.sparsity * (start + score.numel())) - round(self.sparsity * start)
        if drop in (0, score.numel()):
            return torch.full_like(score, drop == 0, dtype=torch.bool)
        flat = score.flatten()
        last = _kth_smallest(flat, drop)  # of the scores that tie with it, the first stay
        mask = flat > last
        ties = (flat == last).nonzero().squeeze(1)
        mask[ties[: score.numel() - drop - int(mask.sum())]] = True
        return mask.view(score.shape)

    def keep_rows(self, score: Tensor) -> Tensor:
        rows, columns = score.shape
        ends = (torch.arange(rows + 1, dtype=torch.float64) * columns * self.sparsity).round()
        drop = ends.diff().to(score.device)  # equal to within one weight, the exact count in all
        kept = torch.arange(columns, device=score.device) >= drop[:, None]
        return torch.empty_like(kept).scatter_(1, score.argsort(dim=1, stable=True), kept)

    def violation(self, weight: Tensor) -> str | None:
        zeros, needed = int((weight == 0).sum()), round(self.sparsity * weight.numel())
        return None if zeros >= needed else f"{count(zeros, 'zero')} of {count(weight.numel(), 'weight')}, {needed} needed"


@dataclass(frozen=True, slots=True)
class NM:
    """Keep `n` of every `m` consecutive weights of a row (0 < n < m)."""

    n: int
    m: int
    rowwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ratio(self.n, self.m)

    def __str__(self) -> str:
        return sparsity_text((self.n, self.m))

    @property
    def period(self) -> int:
        return self.m

    def misfit(self, rows: int, columns: int) -> str | None:
        return f"its width of {count(columns, 'column')} is not a multiple of {self.m}" if columns % self.m else None

    def keep(self, score: Tensor, *, start: int = 0) -> Tensor:
        groups = score.unflatten(-1, (-1, self.m))
        if self.m <= _SMALL_GROUP:
            return _ranked_below(groups, self.n).flatten(-2)
        top = groups.topk(self.n, dim=-1, sorted=False).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, top, True).flatten(-2)

    def keep_rows(self, score: Tensor) -> Tensor:
        return self.keep(score)

    def violation(self, weight: Tensor) -> str | None:
        if misfit := self.misfit(*weight.shape):
            return misfit
        counts = (weight.unflatten(1, (-1, self.m)) != 0).sum(-1)
        if bool((counts <= self.n).all()):
            return None
        row, group = (int(i) for i in (counts > self.n).nonzero()[0])
        first = group * self.m
        return f"row {row}, columns {first} to {first + self.m - 1}: {int(counts[row, group])} nonzeros, {self.n} allowed"


@dataclass(frozen=True, slots=True)
class Stacked:
    """`pattern` for each of several matrices that lie one above the other: the first has `rows[0]` rows, and so on."""

    pattern: Pattern
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.pattern} in {count(len(self.rows), 'matrix')}"

    @property
    def period(self) -> int:
        return self.pattern.period

    @property
    def rowwise(self) -> bool:
        return self.pattern.rowwise

    def misfit(self, rows: int, columns: int) -> str | None:
        return next((why for own in self.rows if (why := self.pattern.misfit(own, columns))), None)

    def keep(self, score: Tensor, *, start: int = 0) -> Tensor:
        starts = [start * rows // sum(self.rows) for rows in self.rows]
        parts = zip(score.split(self.rows, dim=-2), starts, strict=True)
        return torch.cat([self.pattern.keep(part, start=own) for part, own in parts], dim=-2)

    def keep_rows(self, score: Tensor) -> Tensor:
        return torch.cat([self.pattern.keep_rows(part) for part in score.split(self.rows)])

    def violation(self, weight: Tensor) -> str | None:
        return next((why for part in weight.split(self.rows) if (why := self.pattern.violation(part))), None)


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of many values: a sample says between which two it must lie, and only those between are searched.

    Where the sample misleads, all are searched.
    """
    if len(values) > 4 * _SAMPLE:
        sample = values[:: len(values) // _SAMPLE]
        rank, share = k / len(values) * len(sample), k / len(values)
        margin = 4 * math.sqrt(len(sample) * share * (1 - share)) + 1
        low = sample.kthvalue(max(int(rank - margin), 1)).values
        high = sample.kthvalue(min(int(rank + margin) + 1, len(sample))).values
        below, between = int((values < low).count_nonzero()), values[(values >= low) & (values <= high)]
        if below < k <= below + len(between):
            return between.kthvalue(k - below).values
    return values.kthvalue(k).values  # faster than topk


def _ranked_below(groups: Tensor, n: int) -> Tensor:
    """Mask of the n highest of each group (..., m), by counting the pairs each one loses: no sort, no gather."""
    columns = [column.contiguous() for column in groups.unbind(-1)]
    lost = [torch.zeros_like(column, dtype=torch.int8) for column in columns]
    for i, j in itertools.combinations(range(len(columns)), 2):
        first = columns[i] >= columns[j]  # of two that tie, the first wins
        lost[j] += first
        lost[i] += ~first
    return torch.stack([count < n for count in lost], dim=-1)


def parse(text: str | float | Pattern) -> Pattern:
    """Read a pattern: `0.5`, `"50%"` or `"2:4"` (keep 2 of every 4).

    Raises:
        InputError: the text is no pattern, or an impossible one.
    """
    if isinstance(text, (Unstructured, NM)):
        return text
    found = read_sparsity(str(text))
    return NM(*found) if isinstance(found, tuple) else Unstructured(found)


def verify(weight: Tensor, pattern: Pattern) -> None:
    """Prove that `weight` (out, in) has `pattern`.

    Raises:
        ValueError: it has not; the message says where.
    """
    if problem := pattern.violation(weight):
        raise ValueError(f"not {pattern}: {problem}")
