"""Which columns share a group of an N:M pattern: an order of the columns in which the mask costs less.

An N:M mask drops M - N of each M neighbours in a row, so its cost depends on which columns are neighbours (Pool and Yu,
"Channel permutations for N:M sparsity", 2021, who sum magnitudes). Here dropping a set D of a row costs what it does by second
order, all other weights free to make up for it: w_D (H^-1_DD)^-1 w_D (Hassibi and Stork, 1993). Sums of single costs will not
do: of two inputs that can stand in for each other, either is cheap to drop and both are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations, combinations_with_replacement

import torch
from torch import Tensor

from llmprune.numerics.linalg import inverse_factor

# Added to the Gram, of its mean diagonal: the other weights make up for less than they seem to, since half of them are dropped,
# too. With the solvers' .01 an order gained as much on the text that it was found on, and less on others.
DAMPING = 1.0
ROUNDS = 200  # at most
SEARCH = 1e5  # as many operations of matrix products a weight take the time that a search took on a CPU of two cores
PATIENCE, LEAST = 10, 2e-3  # so many rounds must together save this share of the cost


def inverse_of(gram: Tensor) -> Tensor:
    """H^-1 (in, in) of a damped Gram.

    Raises:
        InputError: the Gram is zero or not finite.
    """
    upper = inverse_factor(gram, DAMPING).upper
    return upper.T @ upper


@dataclass(frozen=True, slots=True)
class Costs:
    """What dropping weights costs, of rows that share a Gram.

    Attributes:
        unit: (columns, rows), w_j / sqrt([H^-1]_jj).
        alike: (columns, columns), H^-1 in units in which its diagonal is 1.
    """

    unit: Tensor
    alike: Tensor

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor) -> Costs:
        """Of rows (out, in) of one matrix or several, on inputs with the Gram (in, in).

        Raises:
            InputError: the Gram is zero or not finite.
        """
        inverse = inverse_of(gram)
        scale = inverse.diagonal().rsqrt()
        return cls((weight * scale).T.contiguous(), inverse * scale * scale[:, None])

    def part(self, columns: Tensor) -> Costs:
        """Of some of the columns."""
        return Costs(self.unit[columns], self.alike[columns][:, columns])


@dataclass(frozen=True, slots=True)
class Order:
    """An order of columns.

    Attributes:
        columns: (columns,) which comes first, second, ...
        before: what the mask costs in the order as it was; `after`: in this one, never more.
    """

    columns: Tensor
    before: float
    after: float


def find_order(costs: Sequence[Costs], size: int, drop: int, generator: torch.Generator) -> Order:
    """An order of the columns that all of `costs` have in common, in which it costs little to drop `drop` of each
    `size` neighbours.

    Args:
        size: small: of two groups of four there are 35 ways to deal out the columns, of eight 6435.
        generator: on the CPU.

    Begins with the present order. In each round all groups are paired at random, and each pair's columns are dealt out
    anew in the best of all ways.
    """
    device = costs[0].unit.device
    groups = torch.arange(len(costs[0].unit), device=device).view(-1, size)
    whole = [tuple(range(size))]
    halves = list(combinations(range(2 * size), size))  # number i and number i from the end are each other's rest
    ways = torch.tensor([one + rest for one, rest in zip(halves, reversed(halves), strict=True)][: len(halves) // 2]).to(device)
    before = after = float(_cost(costs, groups, whole, drop).sum())
    history, half = [before], len(groups) // 2
    for _ in range(ROUNDS if half else 0):
        shuffled = groups[torch.randperm(len(groups), generator=generator).to(device)]
        pairs, rest = shuffled[: 2 * half].view(half, 2 * size), shuffled[2 * half :]
        each = _cost(costs, pairs, halves, drop)
        both = (each + each.flip(0))[: len(ways)]
        least = both.min(0)
        after -= float((both[0] - least.values).sum())
        groups = torch.cat([pairs.gather(1, ways[least.indices]).view(-1, size), rest])
        history.append(after)
        if len(history) > PATIENCE and history[-PATIENCE - 1] - after < LEAST * before:
            break
    return Order(groups.flatten(), before, after)


def _cost(costs: Sequence[Costs], several: Tensor, groups: Sequence[tuple[int, ...]], drop: int) -> Tensor:
    """What the mask costs in each of `groups`, places in each set of columns (sets, columns) of `several`: (groups, sets)."""
    dropped = list(dict.fromkeys(one for group in groups for one in combinations(group, drop)))
    number = {one: index for index, one in enumerate(dropped)}
    total = torch.zeros(len(groups), len(several), dtype=torch.float64, device=several.device)
    width = several.shape[1]
    for one in costs:
        unit = one.unit[several].unbind(1)  # `width` of (sets, rows)
        alike = one.alike[several[:, :, None], several[:, None, :]]
        products = {(i, j): unit[i] * unit[j] for i in range(width) for j in range(i, width)}
        lost = [_quadratic(alike, own, products) for own in dropped]
        for index, group in enumerate(groups):
            inside = [lost[number[own]] for own in combinations(group, drop)]
            total[index] += reduce(torch.minimum, inside).sum(-1)
    return total


def _quadratic(alike: Tensor, dropped: Sequence[int], products: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """What dropping the columns at the places `dropped` costs each row: (sets, rows)."""
    own = list(dropped)
    inverse = torch.linalg.inv(alike[:, own][:, :, own])[..., None]
    found = torch.zeros_like(products[0, 0])
    for (a, i), (b, j) in combinations_with_replacement(enumerate(own), 2):
        found.addcmul_(inverse[:, a, b] * (1 if i == j else 2), products[i, j])
    return found
