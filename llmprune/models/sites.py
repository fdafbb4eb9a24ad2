"""A prunable matrix and the decoder block it stands in."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Part = tuple["int | slice", ...]  # an index of a tensor that gives a view; () is all of it
See = Callable[[Tensor, "Tensor | None"], None]  # inputs (..., in), and which of the batch's positions they are, None for all
OUTER, INNER = "outer", "inner"  # what an expert is fed, and what its last matrix is
_WATCHERS = "_llmprune_watchers"


@dataclass(frozen=True, slots=True)
class Site:
    """One prunable matrix, always seen as (out, in).

    Attributes:
        name: full name, such as `model.layers.0.self_attn.q_proj` or `model.layers.0.mlp.experts.3.up_proj`.
        module: the layer that owns the parameter.
        parameter: full name of the parameter.
        transposed: it is stored as (in, out), as in GPT-2's Conv1D.
        storage: dtype on disk; `write` rounds to it, so that what is computed next is what is saved.
        part: the part of the parameter that the matrix is.
        pool: an expert's matrix shares this name with all that are fed from the same hidden states; None for others.
    """

    name: str
    module: nn.Module
    parameter: str
    transposed: bool
    storage: torch.dtype
    part: Part = ()
    pool: str | None = None

    @property
    def weight(self) -> Tensor:
        """View of the layer's weight, (out, in)."""
        weight = self.module.get_parameter(self.parameter.rpartition(".")[2]).data[self.part]
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

    def watch(self, see: See) -> RemovableHandle:
        """Call `see` with what the matrix is about to be given, each time, until the handle is removed."""
        if self.pool is None:
            return self.module.register_forward_pre_hook(lambda _, args: see(args[0], None))
        watchers = self.module.__dict__.setdefault(_WATCHERS, OrderedDict())
        handle = RemovableHandle(watchers)
        watchers[handle.id] = ((self.part[0], self.pool.rpartition(".")[2]), see)
        return handle


Stage = Sequence[Site]  # matrices that read one and the same input


def show(module: nn.Module, where: tuple[int, str], x: Tensor, tokens: Tensor) -> None:
    """Show the inputs of an expert to those who `watch` it."""
    for watched, see in list(module.__dict__.get(_WATCHERS, {}).values()):
        if watched == where:
            see(x, tokens)


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

    def stored(self, name: str, part: Part = ()) -> Tensor:
        """A part of the parameter called `name` (in full) as it is saved: in its own layout and dtype, on the host."""
        return self.module.get_parameter(name.removeprefix(f"{self.name}.")).data[part].to("cpu", self.storage[name])

    def copy(self) -> Block:
        """The same block as it is now, with weights of its own."""
        module = copy.deepcopy(self.module)
        owners = [site.parameter.removeprefix(f"{self.name}.").rpartition(".")[0] for site in self.sites]
        own = [replace(site, module=module.get_submodule(owner)) for site, owner in zip(self.sites, owners, strict=True)]
        return replace(self, module=module, sites=own)


def part_text(part: Part) -> str:
    """`part` as one would write it between brackets, such as `3, 0:16`."""

    def text(index: int | slice) -> str:
        if isinstance(index, int):
            return str(index)
        ends = ["" if end is None else str(end) for end in (index.start, index.stop, index.step)]
        return ":".join(ends if ends[2] else ends[:2])

    return ", ".join(map(text, part))


def read_part(text: str) -> Part:
    """What `part_text` wrote.

    Raises:
        ValueError: it is something else.
    """
    fields = [field.strip().split(":") for field in text.split(",")] if text else []
    return tuple(int(ends[0]) if len(ends) == 1 else slice(*(int(end) if end else None for end in ends)) for ends in fields)
