"""Budgets that pruned weights meet: how sparse each matrix becomes is chosen, by a scan, so that the model loses least.

Parameters and multiplications are counted of weights that are not zero. Bytes are those of the files that `llmprune pack`
makes, so that a matrix stays dense or becomes 2:4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.base.errors import InputError
from llmprune.base.notation import ALLOWANCES, Allowance
from llmprune.base.words import count
from llmprune.cost import disk_bytes, macs, parameters
from llmprune.cost.base import Cost, Sized
from llmprune.cost.matrices import matrices
from llmprune.formats.matrices import packed_bytes
from llmprune.formats.packed import packable
from llmprune.job.job import Job
from llmprune.job.scan import Allocation, Scan, Scanned, loss
from llmprune.models.experts import experts_per_token
from llmprune.models.sites import Site
from llmprune.models.skeleton import Skeleton
from llmprune.numerics.patterns import NM, Pattern, Unstructured
from llmprune.steps.weights.allocate.base import grid, levels
from llmprune.steps.weights.allocate.sensitivity import choose
from llmprune.steps.weights.library import group_name
from llmprune.steps.weights.selection import Selection

_PACKED = NM(2, 4)
_MOST = 0.9  # of all chosen matrices together: sparser is refused
_LEFT = {
    "target_params": "nonzero parameters",
    "target_macs": "multiplications a token, of nonzero weights",
    "target_bytes": "weight bytes when packed",
}
_COUNTED: dict[str, Cost] = {"target_params": parameters, "target_macs": macs, "target_bytes": disk_bytes}


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A site as costs see it: `share` of the tokens that meet it, `itemsize` on disk, and whether it can be packed."""

    rows: int
    columns: int
    share: float
    itemsize: int
    packable: bool

    def left(self, option: str, pattern: Pattern | None) -> float:
        """What it still counts for when it has been pruned."""
        weights = self.rows * self.columns
        if option == "target_bytes":
            packed = self.packable and pattern == _PACKED
            return packed_bytes(self.rows, self.columns, self.itemsize) if packed else weights * self.itemsize
        kept = weights
        if isinstance(pattern, Unstructured):
            kept -= round(pattern.sparsity * weights)
        elif isinstance(pattern, NM):
            kept = weights * pattern.n // pattern.m
        return kept * (self.share if option == "target_macs" else 1.0)


@dataclass(frozen=True, slots=True)
class _Limit:
    """`most` of `whole` may stay, `outside` of which is not in the chosen matrices."""

    option: str
    text: str
    most: int
    whole: int
    outside: float

    @property
    def inside(self) -> float:
        return self.most - self.outside

    def __str__(self) -> str:
        return f"{self.most:,} of {self.whole:,} {ALLOWANCES[self.option].noun}"


class WeightBudget:
    """What the job's budgets leave of the chosen matrices.

    Attributes:
        towards: the pattern that, in every matrix, would come next to the budget; what matrices are scanned at.

    Raises:
        InputError: the budgets leave all, or less than can be reached.
    """

    def __init__(self, job: Job, skeleton: Skeleton, selection: Selection) -> None:
        sized, found = Sized.of(skeleton), _matrices(skeleton)
        self._matrices: dict[str, list[_Matrix]] = {}
        for site, matrix in found:
            if site.name in selection.patterns:
                self._matrices.setdefault(group_name(site), []).append(matrix)
        self._limits = []
        for option, text in job.config.budgets.items():
            whole = _COUNTED[option].measure(sized) or 0
            most = Allowance.parse(text, option).of(whole)
            self._limits.append(_Limit(option, text, most, whole, whole - self._left(option, None)))
        packed = any(limit.option == "target_bytes" for limit in self._limits)
        self.towards: Pattern = _PACKED if packed else Unstructured(min(self._sparsity(), _MOST))
        self._check()

    def __str__(self) -> str:
        kept = f"{_PACKED} or dense" if self.towards == _PACKED else "unstructured"
        matrices_ = count(sum(map(len, self._matrices.values())), "matrix")
        return f"{kept}, keep at most {' and '.join(map(str, self._limits))}, in {matrices_}"

    def grid(self) -> list[Pattern]:
        """The patterns at which errors must be known."""
        return [_PACKED] if self.towards == _PACKED else grid(self.towards)

    def allocate(self, scan: Scan) -> Allocation:
        """What is reckoned to lose least, as `sensitivity` reckons.

        Raises:
            InputError: nothing keeps within the budgets.
        """
        every = scan.matrices
        choices = [self._choices(one) for one in every]
        losses = [[loss(one, scan.probe, own) for own in each] for one, each in zip(every, choices, strict=True)]
        limits = [(self._sizes(limit.option, every, choices), limit.inside) for limit in self._limits]
        picked = choose(losses, *limits)
        return {one.name: each[index] for one, each, index in zip(every, choices, picked, strict=True)}

    def told(self, allocation: Allocation) -> list[tuple[str, int, int]]:
        """Of each budget what it counts, what the dense model has, and what stays."""
        return [
            (_LEFT[limit.option], limit.whole, round(limit.outside + self._left(limit.option, allocation)))
            for limit in self._limits
        ]

    def _choices(self, one: Scanned) -> list[Pattern | None]:
        if self.towards != _PACKED:
            return levels(one, self.towards)
        packable = str(_PACKED) in one.errors and any(own.packable for own in self._matrices[one.name])
        return [None, _PACKED] if packable else [None]

    def _sizes(self, option: str, every: Sequence[Scanned], choices: Sequence[Sequence[Pattern | None]]) -> list[list[float]]:
        return [
            [sum(own.left(option, pattern) for own in self._matrices[one.name]) for pattern in each]
            for one, each in zip(every, choices, strict=True)
        ]

    def _left(self, option: str, allocation: Allocation | None) -> float:
        """Of all chosen matrices; dense, where nothing is said."""
        return sum(
            own.left(option, allocation[name] if allocation else None) for name, each in self._matrices.items() for own in each
        )

    def _sparsity(self) -> float:
        """That would meet all budgets if every matrix had it."""
        return max(1 - limit.inside / max(self._left(limit.option, None), 1) for limit in self._limits)

    def _check(self) -> None:
        sparsest = dict.fromkeys(self._matrices, self.towards if self.towards == _PACKED else Unstructured(_MOST))
        for limit in self._limits:
            least = limit.outside + self._left(limit.option, sparsest)
            if limit.most < least:
                how = "2:4 in all matrices that can be packed" if self.towards == _PACKED else f"{_MOST:.0%} in every matrix"
                raise InputError(f"{limit.option} {limit.text} is {limit}, but {how} leaves {least:,.0f}: ask for more")


def _matrices(skeleton: Skeleton) -> list[tuple[Site, _Matrix]]:
    """All sites of the blocks, as costs see them."""
    able, chosen = set(packable(skeleton)[0].values()), experts_per_token(skeleton.model.config)
    found = []
    for block in skeleton.describe():
        for site, one in zip(block.sites, matrices(block.sites, chosen), strict=True):
            fits = site.name in able and site.storage.itemsize == 2 and not _PACKED.misfit(site.rows, site.columns)
            found.append((site, _Matrix(site.rows, site.columns, one.share, site.storage.itemsize, fits)))
    return found
