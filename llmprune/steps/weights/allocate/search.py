"""By trying: patterns are moved between matrices, and what predicts most as the dense model does goes on (after Sieberling et
al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", 2025).

A generation is some children of the best so far, tried on few tokens; those that do best are tried on more, beside it. What
EvoPress draws at random is measured here as long as that leads on: each matrix alone is moved a level up and down in the
pruned parent, on few tokens, and integer programs over what that costs, which prefer fewer moves to more, propose the children.
From a parent that they do not better, children are drawn: a few matrices keep a level more, others as many weights less.

The search starts from the better of the same pattern everywhere and what sensitivities propose. In the end these two and what
was found are tried on yet more tokens, and the best of the three counts. Levels are those that matrices have been solved at,
farther apart than those which `sensitivity` chooses from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

from llmprune.job.scan import Allocation, Scan, Scanned, loss, total_weights
from llmprune.numerics.patterns import Pattern, Unstructured
from llmprune.steps.weights.allocate import sensitivity
from llmprune.steps.weights.allocate.base import STRIDE, Trials, exact, levels, share

measures = True
CHILDREN = 16
ROUNDS = ((2048, 4), (8192, 1))  # tokens, and how many candidates go on from there
LAST = 32768  # tokens that decide in the end
STALE = 30  # generations without a better one, after which the search ends
PENALTIES = (0.0, 0.1, 0.2, 0.4, 0.8)  # on a move, times what a move costs or gains in the median
_SLACK = 1e-9  # of the budget: rounding

Picked: TypeAlias = tuple[int, ...]  # of each matrix the number of its level


@dataclass(frozen=True, slots=True)
class _Space:
    """What candidates are made of: of each matrix its levels, the one that keeps most first, what is kept at each, and how much
    all together may."""

    matrices: Sequence[Scanned]
    choices: Sequence[Sequence[Pattern | None]]
    sizes: Sequence[Sequence[float]]
    most: float

    @classmethod
    def of(cls, scan: Scan, pattern: Pattern) -> _Space:
        choices = [levels(one, pattern, STRIDE) for one in scan.matrices]
        sizes = [[one.weights * share(own) for own in each] for one, each in zip(scan.matrices, choices, strict=True)]
        return cls(scan.matrices, choices, sizes, total_weights(scan.matrices) * share(pattern) * (1 + _SLACK))

    def allocation(self, picked: Picked) -> dict[str, Pattern | None]:
        return {one.name: each[own] for one, each, own in zip(self.matrices, self.choices, picked, strict=True)}

    def size(self, picked: Sequence[int]) -> float:
        return sum(each[own] for each, own in zip(self.sizes, picked, strict=True))

    def child(self, parent: Picked, rng: random.Random) -> Picked:
        """`parent` with one to three matrices, mostly one, a level denser and others sparser until that fits; what is then left
        over is given to whichever matrices it is enough for.
        """
        picked, every = list(parent), range(len(parent))
        for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
            denser = rng.choice([i for i in every if picked[i]] or [0])
            picked[denser] = max(picked[denser] - 1, 0)
            while self.size(picked) > self.most:
                able = [i for i in every if i != denser and picked[i] < len(self.sizes[i]) - 1]
                if not able:
                    return parent
                picked[rng.choice(able)] += 1
        left = self.most - self.size(picked)
        for i in rng.sample(every, len(parent)):
            if picked[i] and (more := self.sizes[i][picked[i] - 1] - self.sizes[i][picked[i]]) <= left:
                picked[i], left = picked[i] - 1, left - more
        return tuple(picked)


def allocate(scan: Scan, pattern: Pattern, trials: Trials | None = None) -> Allocation:
    assert trials is not None
    space = _Space.of(scan, pattern)
    uniform = tuple(each.index(pattern) for each in space.choices)
    losses = [[loss(one, scan.probe, own) for own in each] for one, each in zip(space.matrices, space.choices, strict=True)]
    reckoned = tuple(sensitivity.choose(losses, (space.sizes, space.most)))
    found = _evolve(space, (uniform, reckoned), trials)
    ends = {"uniform": uniform, "sensitivity": reckoned, "found": found}
    nats = dict(zip(ends, trials.measured([space.allocation(own) for own in ends.values()], LAST), strict=True))
    trials.keep({**trials.known, "tokens": LAST, "nats": nats})
    winner = min(nats, key=nats.__getitem__)
    if winner == "sensitivity":
        return sensitivity.allocate(scan, pattern)  # from levels that lie closer
    best = space.allocation(ends[winner])
    if not isinstance(pattern, Unstructured):
        return best
    return exact(space.matrices, {name: own.sparsity for name, own in best.items() if isinstance(own, Unstructured)}, pattern)


def _evolve(space: _Space, start: Sequence[Picked], trials: Trials) -> Picked:
    """The best that generations come to, from `start` or from what an earlier run knows."""
    parent, stale = tuple(trials.known.get("parent", ())), trials.known.get("stale", 0)
    generation = trials.known.get("generation", 0)
    if not parent:
        parent, _ = _best(space, start, ROUNDS[-1][0], trials)
    going = True
    while going and stale < STALE:
        rng = random.Random(f"{trials.seed} {generation}")
        drawn = (space.child(parent, rng) for _ in range(CHILDREN))
        best, nats = _select(space, parent, list(drawn) if stale else _proposed(space, parent, trials), trials)
        stale = 0 if best != parent else stale + 1
        parent, generation = best, generation + 1
        going = trials.keep({"parent": parent, "generation": generation, "stale": stale, "best": nats})
    return parent


def _proposed(space: _Space, parent: Picked, trials: Trials) -> list[Picked]:
    """Children that are reckoned to do best, by what each move of one matrix costs where all others are as in `parent`."""
    moves = [
        (i, parent[i] + step) for i in range(len(parent)) for step in (-1, 1) if 0 <= parent[i] + step < len(space.choices[i])
    ]
    moved = [(*parent[:i], level, *parent[i + 1 :]) for i, level in moves]
    before, *after = trials.measured([space.allocation(own) for own in (parent, *moved)], ROUNDS[0][0])
    costs = {move: nats - before for move, nats in zip(moves, after, strict=True)}
    options = [[own, *(level for level in (own - 1, own + 1) if (i, level) in costs)] for i, own in enumerate(parent)]
    usual = median(map(abs, costs.values()))
    sizes = [[space.sizes[i][level] for level in own] for i, own in enumerate(options)]
    children = []
    for penalty in PENALTIES:
        each = [[0.0, *(costs[i, level] + penalty * usual for level in own[1:])] for i, own in enumerate(options)]
        picked = sensitivity.choose(each, (sizes, space.most))
        children.append(tuple(own[number] for own, number in zip(options, picked, strict=True)))
    return children


def _select(space: _Space, parent: Picked, children: Sequence[Picked], trials: Trials) -> tuple[Picked, float]:
    """The best of all, and its divergence on the last round's tokens; only then the parent is tried, too."""
    some = [own for own in dict.fromkeys(children) if own != parent]
    for tokens, survivors in ROUNDS[:-1]:
        if len(some) > survivors:
            nats = trials.measured([space.allocation(own) for own in some], tokens)
            some = [some[i] for i in sorted(range(len(some)), key=nats.__getitem__)[:survivors]]
    return _best(space, [parent, *some], ROUNDS[-1][0], trials)


def _best(space: _Space, some: Sequence[Picked], tokens: int, trials: Trials) -> tuple[Picked, float]:
    nats = trials.measured([space.allocation(own) for own in some], tokens)
    return min(zip(some, nats, strict=True), key=lambda one: one[1])
