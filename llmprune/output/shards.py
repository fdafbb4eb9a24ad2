"""Write a checkpoint one block at a time. Tensors keep the names and dtypes that the source has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from safetensors.torch import save_file
from torch import Tensor, nn

from llmprune.base.files import INDEX, write_json
from llmprune.formats.quantised import read_values
from llmprune.models.checkpoint import opened, read_header
from llmprune.models.names import Names
from llmprune.models.sites import Block, Part

_OUTSIDE_BYTES = 2**30  # a shard of tensors outside the blocks holds at most this, or one tensor


class Readable(Protocol):
    def read(self, names: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
        """Tensors by their names on disk."""
        ...


class Layout(Protocol):
    """What is written: the blocks of a model, where on disk their tensors go, and what is copied as it is."""

    @property
    def blocks(self) -> Mapping[str, nn.Module]: ...

    @property
    def names(self) -> Names: ...

    @property
    def checkpoint(self) -> Readable:
        """Holds what is copied."""
        ...

    def inside(self, block: str) -> list[str]:
        """The model's tensors of one block."""
        ...

    def outside_on_disk(self) -> dict[str, int]:
        """Tensors on disk that belong to no block, and their bytes."""
        ...


class ShardWriter:
    """A `Sink`: one safetensors shard a block, further ones for what is outside the blocks, then the index.

    `edited` names the parameters that are taken from the model, and may grow until their block is put; all else is
    copied from the source, bit for bit. `coded` has what some tensors on disk are replaced by, the codes of their weights of
    `bits`, and may grow and shrink alike.
    """

    def __init__(
        self,
        layout: Layout,
        folder: Path,
        edited: Collection[str],
        coded: Mapping[str, Mapping[str, Tensor]] | None = None,
        bits: int = 0,
    ) -> None:
        self._layout, self._folder, self._edited = layout, folder, edited
        self._coded: Mapping[str, Mapping[str, Tensor]] = {} if coded is None else coded
        self._bits = bits
        self._outside = self._plan_outside()
        self._count = len(layout.blocks) + len(self._outside)
        self._weight_map: dict[str, str] = {}

    def shard(self, block: Block) -> Path:
        """The block's file."""
        return self._file(block.index + 1)

    def put(self, block: Block) -> None:
        """Write the block's tensors."""
        places = self._places(block)
        copied = [disk for disk, (name, _) in places.items() if name not in self._edited]
        tensors = dict(self._layout.checkpoint.read(copied))
        for disk, place in places.items():
            if disk not in tensors:
                tensors |= self._coded[disk] if disk in self._coded else {disk: block.stored(*place)}
        self._write(block.index + 1, tensors)

    def restore(self, block: Block) -> None:
        """Take the block's weights from its shard, which an earlier run wrote."""
        places, own = self._places(block), dict(block.module.named_parameters())
        with opened(self.shard(block)) as shard:
            for disk, (name, part) in places.items():
                parameter = own.get(name.removeprefix(f"{block.name}."))
                if parameter is not None:
                    value = read_values(shard, disk, self._bits)
                    parameter.data[part] = value.to(parameter.device, parameter.dtype)
            self._weight_map |= dict.fromkeys(shard.keys(), self.shard(block).name)

    def finish(self) -> None:
        """Write what is outside the blocks, and the index."""
        for number, names in enumerate(self._outside, len(self._layout.blocks) + 1):
            self._write(number, dict(self._layout.checkpoint.read(names)))
        files = set(self._weight_map.values())
        total = sum(info.nbytes for file in files for info in read_header(self._folder, file).values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._weight_map.items()))}
        write_json(self._folder / INDEX, index)

    def _places(self, block: Block) -> dict[str, tuple[str, Part]]:
        """The block's tensors on disk -> the model's tensors, and the parts of those."""
        inside = self._layout.inside(block.name)
        return {piece.disk: (name, piece.part) for name in inside for piece in self._layout.names[name]}

    def _plan_outside(self) -> list[list[str]]:
        shards: list[list[str]] = []
        room = 0
        for name, nbytes in self._layout.outside_on_disk().items():
            if nbytes > room:
                shards.append([])
                room = _OUTSIDE_BYTES
            shards[-1].append(name)
            room -= nbytes
        return shards

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, self._file(number), metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, self._file(number).name)

    def _file(self, number: int) -> Path:
        return self._folder / f"model-{number:05d}-of-{self._count:05d}.safetensors"
