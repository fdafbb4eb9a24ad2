"""What becomes of a model's parameters as its channels change places or are rotated, and the checkpoint in which they have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from llmprune.models.names import Names, Piece
from llmprune.models.sites import Part
from llmprune.models.skeleton import Skeleton


class Change(Protocol):
    """What is done to a parameter."""

    @property
    def exact(self) -> bool:
        """Whether values stay what they are."""
        ...

    def apply(self, value: Tensor) -> None:
        """Change `value` in place."""
        ...


@dataclass(frozen=True, slots=True)
class Move:
    """Other channels along a dimension of a parameter.

    Attributes:
        basis: (size,) which channel comes first, second, ...; or (heads, width, width), orthogonal, each head's new channels in
            columns.
        part: the part of the parameter that `dim` is a dimension of.
    """

    basis: Tensor
    dim: int
    part: Part = ()

    @property
    def exact(self) -> bool:
        return self.basis.ndim == 1

    def apply(self, value: Tensor) -> None:
        part, basis = value[self.part], self.basis.to(value.device)
        if self.exact:
            part.copy_(part.index_select(self.dim, basis))
        else:
            own = part.movedim(self.dim, -1)
            own.copy_(torch.einsum("...hw,hwv->...hv", own.unflatten(-1, basis.shape[:2]), basis.to(own.dtype)).flatten(-2))


@dataclass(frozen=True, slots=True)
class Scale:
    """Each channel along a dimension times its own `factor` (size,)."""

    factor: Tensor
    dim: int
    part: Part = ()
    exact = False

    def apply(self, value: Tensor) -> None:
        part = value[self.part]
        part.movedim(self.dim, -1).mul_(self.factor.to(value.device))


@dataclass(frozen=True, slots=True)
class Ones:
    """All values 1."""

    exact = True

    def apply(self, value: Tensor) -> None:
        value.fill_(1)


Moves = dict[str, list[Change]]  # by the parameter's full name


def joined(several: Iterable[Moves]) -> Moves:
    """All of them, in order."""
    found: Moves = {}
    for moves in several:
        for name, own in moves.items():
            found.setdefault(name, []).extend(own)
    return found


def moved(value: Tensor, moves: Sequence[Change]) -> Tensor:
    """A copy of a parameter's value as changed, computed in float32 where it is not moved exactly."""
    exact = all(move.exact for move in moves)
    own = value.clone() if exact else value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
    for move in moves:
        move.apply(own)
    return own.to(value.dtype)


@contextmanager
def in_place(module: nn.Module, moves: Moves, prefix: str = "") -> Iterator[None]:
    """The module's parameters as changed, for a while; `prefix` is what the names of `moves` begin with."""
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
    """The `Layout` of a model whose parameters are as changed: the same names, shapes and dtypes.

    Attributes:
        copies: parameters that the checkpoint has not, since they are tied, and what each begins as.
    """

    skeleton: Skeleton
    moves: Moves
    copies: Mapping[str, str] = field(default_factory=dict)

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
        found = self.skeleton.outside_on_disk()
        tensors = self.skeleton.checkpoint.tensors
        return found | {name: sum(tensors[piece.disk].nbytes for piece in self.names[of]) for name, of in self.copies.items()}

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their names on disk, one parameter at a time."""
        checkpoint, wanted = self.skeleton.checkpoint, set(names)
        for name, moves in self.moves.items():
            sources = self.names[self.copies.get(name, name)]
            pieces = [Piece(name)] if name in self.copies else sources
            asked = [(piece, source) for piece, source in zip(pieces, sources, strict=True) if piece.disk in wanted]
            if not asked:
                continue
            wanted -= {piece.disk for piece, _ in asked}
            parts = dict(checkpoint.read([source.disk for source in sources]))
            first = parts[sources[0].disk]
            whole = torch.empty(self.skeleton.model.get_parameter(name).shape, dtype=first.dtype)
            for source in sources:
                whole[source.part] = parts[source.disk]
            whole = moved(whole, moves)
            yield from ((piece.disk, whole[piece.part].to(parts[source.disk].dtype)) for piece, source in asked)
        yield from checkpoint.read([name for name in names if name in wanted])
