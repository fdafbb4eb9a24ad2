"""OWL: blocks with more outliers are pruned less, all matrices of a block alike (Yin et al., "Outlier Weighed Layerwise
Sparsity", 2024).

A block's density is its share of outliers, scaled to lie within 8 points of the mean on either side, as published.
"""

from __future__ import annotations

from llmprune.base.errors import InputError
from llmprune.job.scan import Allocation, Scan, Scanned, total_weights
from llmprune.numerics.patterns import Pattern, Unstructured
from llmprune.steps.weights.allocate.base import STEP, exact, mean_sparsity

_REACH = 0.08


def allocate(scan: Scan, pattern: Pattern) -> Allocation:
    if not isinstance(pattern, Unstructured):
        raise InputError(f"owl gives each block a sparsity of its own, and {pattern} has but one: use it with e.g. 60%")
    blocks: dict[int, list[Scanned]] = {}
    for one in scan.matrices:
        blocks.setdefault(one.block, []).append(one)
    shares = {index: sum(one.weights * one.outliers for one in own) / total_weights(own) for index, own in blocks.items()}
    low, high = min(shares.values()), max(shares.values())
    width = (high - low) or 1.0
    sparsities = {one.name: -2 * _REACH * (shares[one.block] - low) / width for one in scan.matrices}
    shift = pattern.sparsity - mean_sparsity(scan.matrices, sparsities)
    sparsities = {name: min(max(own + shift, STEP), 1 - STEP) for name, own in sparsities.items()}
    return exact(scan.matrices, sparsities, pattern)
