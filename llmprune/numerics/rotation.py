"""A rotation of channels after which a mask costs less: what matters is gathered in few weights of each group.

Where an orthogonal matrix R fits between what writes channels and what reads them, W becomes W R on inputs with the Gram
R^T H R, or W becomes R^T W. R is found by descent from the identity on what the mask costs, by second order with all other
weights free to make up for it: a set D of a row costs w_D (H^-1_DD)^-1 w_D (Hassibi and Stork, 1993). Gu et al.,
"DenoiseRotator", 2025, rotate before pruning, too, by the entropy of the weights' importance. R is the Cayley transform
(I + A)^-1 (I - A) of a skew-symmetric A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import ClassVar

import torch
from torch import Tensor

STEPS, RATE = 100, 0.01  # Adam's, the rate falling to zero as a cosine
TERMS, LINES = 8, 1024  # of each kind so many matrices a step, and of each so many lines of weights, both drawn at random
SOFTNESS = 0.1  # of the choice of what a group drops, in mean costs; with 1 the loss of a 2:4 model was 1.1 times as high
CHOOSING = 5e3  # as many operations of products take as long, on a CPU of two cores, as what is done with a weight's costs
SAMPLE = 2**14  # costs that a bound is estimated from


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A mask that drops `drop` of each `size` neighbours."""

    size: int
    drop: int

    def least(self, costs: Tensor) -> Tensor:
        """What is lost, of the costs (groups, sets, lines) of each set of a group."""
        return costs.amin(1).sum()

    def soft(self, costs: Tensor) -> Tensor:
        """The same to descend on: a mean over the sets of a group, the cheaper ones counting for more."""
        fixed = costs.detach()
        return (torch.softmax(-fixed / (SOFTNESS * fixed.mean()), 1) * costs).sum()


@dataclass(frozen=True, slots=True)
class Anywhere:
    """A mask that drops the `share` of weights that cost least, each alone."""

    share: float
    size: ClassVar[int] = 1
    drop: ClassVar[int] = 1

    def least(self, costs: Tensor) -> Tensor:
        """What is lost, of the cost (columns, 1, lines) of each weight."""
        return self._below(costs, costs.flatten().kthvalue(max(round(self.share * costs.numel()), 1)).values)

    def soft(self, costs: Tensor) -> Tensor:
        """The same to descend on, the bound estimated."""
        fixed = costs.detach().flatten()
        return self._below(costs, fixed[:: len(fixed) // SAMPLE + 1].quantile(self.share))

    def _below(self, costs: Tensor, bound: Tensor) -> Tensor:
        return torch.where(costs.detach() <= bound, costs, 0).sum()


Mask = Neighbours | Anywhere


@dataclass(frozen=True, slots=True)
class Read:
    """What reads channels: rows, of one matrix or several, whose columns are rotated.

    Attributes:
        weight: (heads, width, rows); a rotation of each head's own.
        inverse: (heads, width, width), H^-1 of the channels.
    """

    weight: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, weight: Tensor, inverse: Tensor, heads: int = 1) -> Read:
        """Of rows (out, in), and H^-1 (in, in), whose columns fall into `heads` of the same width."""
        width = weight.shape[1] // heads
        inside = torch.stack([inverse[i : i + width, i : i + width] for i in range(0, len(inverse), width)])
        return cls(weight.T.reshape(heads, width, -1).contiguous(), inside)

    def some(self, lines: int, generator: torch.Generator) -> Read:
        """Some rows, drawn at random, in place of all."""
        if self.weight.shape[2] <= lines:
            return self
        drawn, share = _drawn(self.weight.shape[2], lines, generator)
        return Read(self.weight[:, :, drawn.to(self.weight.device)] * share, self.inverse)

    def costs(self, rotation: Tensor, mask: Mask) -> Tensor:
        """(groups, sets, rows): of each set of each group of each row."""
        size = mask.size
        own = rotation.unflatten(-1, (-1, size))  # (heads, width, groups, M)
        turned = (self.inverse @ rotation).unflatten(-1, (-1, size))
        inverse = torch.einsum("hwga,hwgb->hgab", own, turned).flatten(0, 1)
        weight = (rotation.mT @ self.weight).view(len(inverse), size, -1)
        return _costs(weight, inverse, mask.drop)


@dataclass(frozen=True, slots=True)
class Written:
    """What writes channels: columns of a matrix whose rows are rotated.

    Attributes:
        weight: (heads, width, groups * M).
        inverse: (groups, M, M), of H^-1 of the matrix's own inputs.
    """

    weight: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, weight: Tensor, inverse: Tensor, size: int, heads: int = 1) -> Written:
        """Of a matrix (out, in) on inputs with H^-1 (in, in), its rows those of `heads`."""
        places = torch.arange(len(inverse), device=inverse.device).view(-1, size)
        return cls(weight.unflatten(0, (heads, -1)), inverse[places[:, :, None], places[:, None, :]])

    def some(self, lines: int, generator: torch.Generator) -> Written:
        """Some groups of columns, drawn at random, in place of all; `lines` of columns."""
        size = self.inverse.shape[-1]
        if len(self.inverse) * size <= lines:
            return self
        drawn, share = _drawn(len(self.inverse), lines // size, generator)
        drawn = drawn.to(self.weight.device)
        return Written(self.weight.unflatten(2, (-1, size))[:, :, drawn].flatten(2) * share, self.inverse[drawn])

    def costs(self, rotation: Tensor, mask: Mask) -> Tensor:
        """(heads * groups, sets, width): of each set of each group of each row."""
        inverse = self.inverse.expand(len(self.weight), -1, -1, -1).flatten(0, 1)
        return _costs((self.weight.mT @ rotation).view(len(inverse), mask.size, -1), inverse, mask.drop)


@dataclass(frozen=True, slots=True)
class Rotation:
    """A rotation, of each head's own.

    Attributes:
        matrix: (heads, width, width), orthogonal.
        before: what the mask costs without it; `after`: with it.
    """

    matrix: Tensor
    before: float
    after: float


def find_rotation(
    reading: Sequence[Read],
    writing: Sequence[Written],
    mask: Mask,
    generator: torch.Generator,
    told: Callable[[int], None] = lambda step: None,
) -> Rotation:
    """A rotation of the channels that all of `reading` and `writing` have in common, after which the mask costs little.

    Args:
        told: is called before each of `STEPS` steps, with its number.
    """
    terms: list[Read | Written] = [*reading, *writing]
    (heads, width, _), device = terms[0].weight.shape, terms[0].weight.device
    identity = torch.eye(width, device=device).expand(heads, -1, -1)
    free = torch.zeros(heads, width, width, device=device, requires_grad=True)
    adam = torch.optim.Adam([free], lr=RATE)
    for step in range(STEPS):
        told(step)
        adam.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        drawn = [*_some(reading, generator), *_some(writing, generator)]
        with torch.enable_grad():
            rotation = _cayley(free, identity)
            costs = [term.some(LINES, generator).costs(rotation, mask) for term in drawn]
            torch.stack([mask.soft(own) for own in costs]).sum().backward()
        adam.step()
        adam.zero_grad()
    rotation = _cayley(free.detach(), identity)

    def total(own: Tensor) -> float:
        return sum(float(mask.least(term.costs(own, mask))) for term in terms)

    before, after = total(identity), total(rotation)
    return Rotation(rotation, before, after) if after < before else Rotation(identity, before, before)


def operations(width: int, reading: int, writing: int) -> float:
    """Those of `find_rotation` with so many matrices that read `width` channels, and that write them: of its products, both
    ways, of solving for the rotation, and of choosing sets, as long as that takes."""
    read, written = min(reading, TERMS), min(writing, TERMS)
    products = 4.0 * width**2 * ((read + 2) * width + (read + written) * LINES)
    return STEPS * (products + CHOOSING * width * LINES * (read + written))


def _some(terms: Sequence[Read] | Sequence[Written], generator: torch.Generator) -> list[Read | Written]:
    drawn, _ = _drawn(len(terms), TERMS, generator)
    return [terms[index] for index in drawn.tolist()]


def _drawn(number: int, wanted: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Some of `number`, and the root of how many each stands for."""
    drawn = torch.randperm(number, generator=generator)[:wanted]
    return drawn, (number / max(len(drawn), 1)) ** 0.5


def _cayley(free: Tensor, identity: Tensor) -> Tensor:
    skew = free - free.mT
    return torch.linalg.solve(identity + skew, identity - skew)


def _costs(weight: Tensor, inverse: Tensor, drop: int) -> Tensor:
    """What dropping each set of `drop` weights of each group costs: (groups, sets, lines), of weight (groups, M, lines) on
    inputs with H^-1 (groups, M, M)."""
    size = weight.shape[1]
    pairs = list(combinations_with_replacement(range(size), 2))
    parts = weight.unbind(1)
    products = torch.stack([parts[i] * parts[j] for i, j in pairs], 1)
    sets = list(combinations(range(size), drop))
    rows, nothing = [], weight.new_zeros(len(weight))
    for own in map(list, sets):
        within = torch.linalg.inv(inverse[:, own][:, :, own])
        row = {
            (i, j): (1 if i == j else 2) * within[:, a, b]
            for (a, i), (b, j) in combinations_with_replacement(enumerate(own), 2)
        }
        rows.append(torch.stack([row.get(pair, nothing) for pair in pairs], -1))
    return torch.stack(rows, 1) @ products
