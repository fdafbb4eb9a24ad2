"""By measured sensitivity: the patterns that are reckoned to lose least, each matrix's loss being its error curve times what
its error was worth when it alone was pruned.

The losses of matrices are taken to add up, which holds less the more is pruned. The choice is an integer program, solved by
HiGHS (Huangfu & Hall, "Parallelizing the dual revised simplex method", 2018) as SciPy has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from llmprune.base.errors import InputError
from llmprune.job.scan import Allocation, Scan, loss, total_weights
from llmprune.numerics.patterns import Pattern, Unstructured
from llmprune.steps.weights.allocate.base import exact, levels, share

_GAP = 1e-5  # of the least loss, at which the search for it ends


def allocate(scan: Scan, pattern: Pattern) -> Allocation:
    matrices, choices = scan.matrices, [levels(one, pattern) for one in scan.matrices]
    losses = [[loss(one, scan.probe, own) for own in each] for one, each in zip(matrices, choices, strict=True)]
    sizes = [[one.weights * share(own) for own in each] for one, each in zip(matrices, choices, strict=True)]
    picked = choose(losses, (sizes, total_weights(matrices) * share(pattern)))
    found = {one.name: each[index] for one, each, index in zip(matrices, choices, picked, strict=True)}
    if not isinstance(pattern, Unstructured):
        return found
    return exact(matrices, {name: own.sparsity for name, own in found.items() if isinstance(own, Unstructured)}, pattern)


def choose(costs: Sequence[Sequence[float]], *limits: tuple[Sequence[Sequence[float]], float]) -> list[int]:
    """One choice of each, by number, whose costs are least while, for each of `limits`, their sizes come to at most so much.

    Raises:
        InputError: even the smallest come to more.
    """
    cost = _flat(costs)
    counts = [len(each) for each in costs]
    owner = np.repeat(np.arange(len(counts)), counts)
    one_each = csr_array((np.ones(len(cost)), (owner, np.arange(len(cost)))), shape=(len(counts), len(cost)))
    within = [LinearConstraint(_flat(sizes)[None] / most, 0, 1 + 1e-9) for sizes, most in limits]
    scale = max(float(abs(cost).max()), 1e-300)
    found = milp(
        cost / scale,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), *within],
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:
        raise InputError("no choice of patterns is small enough: allow more")
    starts = np.cumsum([0, *counts])
    return [int(found.x[low:high].argmax()) for low, high in pairwise(starts)]


def _flat(each: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    return np.concatenate([np.asarray(one, float) for one in each])
