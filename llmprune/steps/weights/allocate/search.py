"""By trying: patterns are moved between matrices, and what predicts most as the dense model does goes on (after Sieberling et
al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", 2025).

A generation is some children of the best so far, in each of which a few matrices keep a level more and others as many weights
less. All are tried on few tokens, those that do best on more, beside their parent. The search starts from the same pattern
everywhere and from what sensitivities propose, and in the end these two and what was found are tried on yet more tokens; the
best of the three is what counts. Levels are those that matrices have been solved at, farther apart than those which
`sensitivity` chooses from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llmprune.job.scan import Allocation, Scan, Scanned, loss, total_weights
from llmprune.numerics.patterns import Pattern, Unstructured
from llmprune.steps.weights.allocate.base import STRIDE, Trials, exact, levels, share
from llmprune.steps.weights.allocate.sensitivity import choose

measures = True
CHILDREN = 16
ROUNDS = ((2048, 4), (8192, 1))  # tokens, and how many candidates go on from there
LAST = 32768  # tokens that decide in the end
_STALE = 40  # generations without a better one, after which the search ends
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
    reckoned = tuple(choose(losses, space.sizes, space.most))
    found = _evolve(space, [uniform, reckoned], trials)
    ends = [uniform, reckoned, found]
    nats = trials.measured([space.allocation(own) for own in ends], LAST)
    best = space.allocation(ends[nats.index(min(nats))])
    trials.keep({**trials.known, "tokens": LAST, "nats": dict(zip(("uniform", "sensitivity", "found"), nats, strict=True))})
    if not isinstance(pattern, Unstructured):
        return best
    return exact(space.matrices, {name: own.sparsity for name, own in best.items() if isinstance(own, Unstructured)}, pattern)


def _evolve(space: _Space, start: list[Picked], trials: Trials) -> Picked:
    """The best that generations come to, from `start` or from what is known."""
    parents = [tuple(own) for own in trials.known.get("parents", start)]
    generation, stale = trials.known.get("generation", 0), trials.known.get("stale", 0)
    going = True
    while going and stale < _STALE:
        rng = random.Random(f"{trials.seed} {generation}")
        children = [space.child(parents[number % len(parents)], rng) for number in range(CHILDREN)]
        best, nats = _select(space, parents, children, trials)
        stale = 0 if best not in parents else stale + 1
        parents, generation = [best], generation + 1
        going = trials.keep({"parents": parents, "generation": generation, "stale": stale, "best": nats})
    return parents[0]


def _select(space: _Space, parents: Sequence[Picked], children: Sequence[Picked], trials: Trials) -> tuple[Picked, float]:
    """The best of all, and its divergence on the last round's tokens; parents need not stand the test of the first rounds."""
    some = [own for own in dict.fromkeys(children) if own not in parents]
    for number, (tokens, survivors) in enumerate(ROUNDS):
        if number == len(ROUNDS) - 1:
            some = [*parents, *some]
        nats = trials.measured([space.allocation(own) for own in some], tokens)
        order = sorted(range(len(some)), key=nats.__getitem__)[:survivors]
        some, nats = [some[i] for i in order], [nats[i] for i in order]
    return some[0], nats[0]
