"""A prunable matrix and the decoder block it stands in."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Site:
    """One prunable matrix, always seen as (out, in).

    Attributes:
        name: full module name, such as `model.layers.0.self_attn.q_proj`.
        module: the layer that owns it.
        transposed: the layer stores (in, out), as GPT-2's Conv1D does.
        storage: dtype on disk; `write` rounds to it, so that what is computed next is what is saved.
    """

    name: str
    module: nn.Module
    transposed: bool
    storage: torch.dtype

    @property
    def weight(self) -> Tensor:
        """View of the layer's weight, (out, in)."""
        weight = self.module.get_parameter("weight").data
        return weight.T if self.transposed else weight

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def columns(self) -> int:
        return self.weight.shape[1]

    def write(self, weight: Tensor) -> None:
        """Replace the weight by `weight` (out, in), rounded to the storage dtype."""
        self.weight.copy_(weight.to(self.storage))


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block, its weights loaded.

    Attributes:
        index: position in the decoder stack, from 0.
        name: full module name, such as `model.layers.0`.
        sites: its prunable matrices, in module order.
        storage: dtype on disk of each of its parameters, by full name.
    """

    index: int
    name: str
    module: nn.Module
    sites: Sequence[Site]
    storage: Mapping[str, torch.dtype]

    def stored(self, name: str) -> Tensor:
        """The parameter called `name` (in full) as it is saved: in its own layout and storage dtype, on the host."""
        return self.module.get_parameter(name.removeprefix(f"{self.name}.")).data.to("cpu", self.storage[name])

    def copy(self) -> Block:
        """The same block as it is now, with weights of its own."""
        module = copy.deepcopy(self.module)
        own = [replace(site, module=module.get_submodule(site.name.removeprefix(f"{self.name}."))) for site in self.sites]
        return replace(self, module=module, sites=own)
