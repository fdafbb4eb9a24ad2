"""Which matrices are quantised, to which grid, and which of them files can hold as codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.quantizers import base as quantizers

from llmprune.base.errors import InputError
from llmprune.base.words import count
from llmprune.formats.packed import linears
from llmprune.models.names import locate
from llmprune.models.sites import Site
from llmprune.models.skeleton import Skeleton
from llmprune.steps.quantise.grid import Grid

GROUP = 128  # columns that share a scale where the user does not say, or their greatest common divisor with a matrix's columns
_LEAST = 8  # columns, below which a group has the whole row instead
_STORED = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """
    Attributes:
        grids: by site.
        coded: of the sites that are stored as codes, the linear layer's name: in the model, an expert's in the checkpoint.
        others: linear layers that are not, such as the head.
        pools: sites of experts.
    """

    grids: dict[str, Grid]
    coded: dict[str, str]
    others: list[str]
    pools: frozenset[str]

    def __str__(self) -> str:
        bits, sizes = {grid.bits for grid in self.grids.values()}, sorted({grid.group for grid in self.grids.values()})
        apart = len(self.grids) - len(self.coded)
        stored = f", {apart} of them stored as the weights that they come to" if apart else ""
        groups = " or ".join(map(str, sizes)) if len(sizes) < 4 else f"{sizes[0]} to {sizes[-1]}"
        return f"{bits.pop()} bits in {count(len(self.grids), 'matrix')}, groups of {groups} columns{stored}"


def plan(skeleton: Skeleton, bits: int, group: int | None, skipped: Mapping[str, str]) -> Plan:
    """All matrices of the blocks but those `skipped`.

    Raises:
        InputError: a group does not divide a matrix's columns, experts would be stored in part as codes, or transformers build
            other modules where the model is quantised.
    """
    rebuilt = getattr(quantizers, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})  # Llama 4's experts (5.23)
    if other := next((name for name in map(_kind, skeleton.model.modules()) if name in rebuilt), None):
        raise InputError(f"{other} cannot be in a quantised model: transformers build others, which the checkpoint lacks")
    every = [site for block in skeleton.describe() for site in block.sites]
    sites = [site for site in every if site.name not in skipped]
    if group is not None and (misfit := next((site for site in sites if site.columns % group), None)):
        raise InputError(f"group_size {group} does not divide the {misfit.columns} columns of {misfit.name}: give a divisor")
    coded = _coded(skeleton, sites)
    _check_experts(every, coded, _coded(skeleton, every))
    shared = math.gcd(*(site.columns for site in sites if site.pool and site.name in coded))  # transformers read one scheme
    pools = frozenset(site.name for site in sites if site.pool)
    own = {site.name: shared if site.pool and site.name in coded else site.columns for site in sites}
    grids = {site.name: Grid(bits, group or default_group(own[site.name]), site.storage) for site in sites}
    return Plan(grids, coded, [name for name in _linear(skeleton) if name not in coded.values()], pools)


def _coded(skeleton: Skeleton, sites: Sequence[Site]) -> dict[str, str]:
    """As in `Plan`: whole weights of linear layers; of experts those that are tensors of their own on disk."""
    linear, found = set(linears(skeleton).values()), {}
    for site in sites:
        if site.storage not in _STORED or site.transposed:
            continue
        place = locate(skeleton.names[site.parameter], site.part)
        if site.name in linear:
            found[site.name] = site.name
        elif site.pool and not place.part:
            found[site.name] = place.disk.removesuffix(".weight")
    return found


def _check_experts(sites: Sequence[Site], coded: Mapping[str, str], able: Mapping[str, str]) -> None:
    """Raises: InputError: some experts stay as they are, beside which transformers (5.23) do not load codes."""
    left = [site.name for site in sites if site.pool and site.name in able and site.name not in coded]
    if left and coded:
        raise InputError(f"{left[0]} is left out: beside codes transformers load experts as codes alone, so name all of them")


def _kind(module: torch.nn.Module) -> str:
    return type(module).__name__


def _linear(skeleton: Skeleton) -> list[str]:
    return [name for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear)]


def default_group(columns: int) -> int:
    """Columns that share a scale."""
    shared = math.gcd(columns, GROUP)
    return shared if shared >= _LEAST else columns
