"""Orders of the rows and columns of a model's parameters, and the checkpoint in which they are as ordered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.models.names import Names
from llmprune.models.sites import Part
from llmprune.models.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Move:
    """A new order along a dimension of a parameter.

    Attributes:
        order: (size,) which index comes first, second, ...
        part: the part of the parameter that `dim` is a dimension of.
    """

    order: Tensor
    dim: int
    part: Part = ()


Moves = dict[str, list[Move]]  # by the parameter's full name


def joined(several: Iterable[Moves]) -> Moves:
    """All of them, in order."""
    found: Moves = {}
    for moves in several:
        for name, own in moves.items():
            found.setdefault(name, []).extend(own)
    return found


def moved(value: Tensor, moves: Sequence[Move]) -> Tensor:
    """A copy of a parameter's value in the new order."""
    value = value.clone()
    for move in moves:
        part = value[move.part]
        part.copy_(part.index_select(move.dim, move.order.to(value.device)))
    return value


@contextmanager
def in_place(module: nn.Module, moves: Moves, prefix: str = "") -> Iterator[None]:
    """The module's parameters as ordered, for a while; `prefix` is what the names of `moves` begin with."""
    own = {name: module.get_parameter(name.removeprefix(prefix)) for name in moves}
    before = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = moved(before[name], moves[name])  # once, where it is tied and has several names
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = before[name]


@dataclass(frozen=True, slots=True)
class Moved:
    """The `Layout` of a model whose parameters are as ordered: the same names, shapes and dtypes, each value moved exactly."""

    skeleton: Skeleton
    moves: Moves

    @property
    def blocks(self) -> Mapping[str, nn.Module]:
        return self.skeleton.blocks

    @property
    def names(self) -> Names:
        return self.skeleton.names

    @property
    def checkpoint(self) -> Moved:
        return self

    def inside(self, block: str) -> list[str]:
        return self.skeleton.inside(block)

    def outside_on_disk(self) -> dict[str, int]:
        return self.skeleton.outside_on_disk()

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their names on disk, one parameter at a time."""
        checkpoint, wanted = self.skeleton.checkpoint, set(names)
        for name, moves in self.moves.items():
            pieces = self.names[name]
            asked = [piece for piece in pieces if piece.disk in wanted]
            if not asked:
                continue
            wanted -= {piece.disk for piece in asked}
            parts = dict(checkpoint.read([piece.disk for piece in pieces]))
            whole = torch.empty(self.skeleton.model.get_parameter(name).shape, dtype=parts[pieces[0].disk].dtype)
            for piece in pieces:
                whole[piece.part] = parts[piece.disk]
            whole = moved(whole, moves)
            yield from ((piece.disk, whole[piece.part].to(parts[piece.disk].dtype)) for piece in asked)
        yield from checkpoint.read([name for name in names if name in wanted])
