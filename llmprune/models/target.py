"""The smaller model: what transformers build from its configuration, without weights, into which blocks are put one by one.

Nothing in a module is changed by hand: the blocks that calibration and evaluation run on are those that `from_pretrained` will
build. What is outside the blocks stays as the source has it, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from accelerate.utils import set_module_tensor_to_device
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.base.words import count
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks, make_block
from llmprune.models.names import Piece
from llmprune.models.sites import Block, Part
from llmprune.models.skeleton import Skeleton, empty_model


class Target:
    """The smaller model of `config`, whose blocks come from those of `source` that are numbered in `layers`.

    Attributes:
        names: where on disk each tensor of its blocks will be.

    Raises:
        InputError: transformers cannot build it, or build it otherwise.
    """

    def __init__(self, source: Skeleton, config: PretrainedConfig, layers: Sequence[int]) -> None:
        self.checkpoint: Checkpoint = source.checkpoint
        self.config, self.device, self.dtype = config, source.device, source.dtype
        self.model = empty_model(source.checkpoint.folder, config, source.dtype)
        self.blocks = find_blocks(self.model)
        self._source = source
        if len(self.blocks) != len(layers):
            raise InputError(f"transformers build {count(len(self.blocks), 'layer')} where {len(layers)} should stay")
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self.names: dict[str, tuple[Piece, ...]] = {}
        self._storage: dict[str, torch.dtype] = {}
        olds = list(source.blocks)
        for new, old in zip(self.blocks, (olds[i] for i in layers), strict=True):
            self._place(new, old)

    def _place(self, new: str, old: str) -> None:
        """Where the tensors of block `new` will be: where those of `old` are in the source, with the block's own number."""
        number, instead = old.rpartition(".")[2], new.rpartition(".")[2]
        for name in self._source.inside(old):
            path = name.removeprefix(f"{old}.")
            full = f"{new}.{path}"
            try:
                sizes = self.blocks[new].get_parameter(path).shape, self._source.blocks[old].get_parameter(path).shape
            except AttributeError:
                raise InputError(
                    f"{name} cannot be carried into a smaller {type(self.model).__name__}: it is no parameter there"
                ) from None
            self.names[full] = tuple(
                Piece(re.sub(rf"(^|\.){number}\.", rf"\g<1>{instead}.", piece.disk, count=1), _resized(piece.part, *sizes))
                for piece in self._source.names[name]
            )
            self._storage[full] = self.checkpoint.tensors[self._source.names[name][0].disk].dtype or self.dtype

    def inside(self, block: str) -> list[str]:
        """Tensors of one block."""
        return [name for name in self.names if name.startswith(block + ".")]

    def outside_on_disk(self) -> dict[str, int]:
        """Tensors that belong to no block, and their bytes."""
        return self._source.outside_on_disk()

    def storage(self) -> dict[str, torch.dtype]:
        """The dtype on disk of each parameter, by full name."""
        outside = {name: dtype for name, dtype in self._source.storage().items() if not self._source.block_of(name)}
        return outside | self._storage

    def describe(self) -> list[Block]:
        """The decoder blocks and their sites, whether their weights are there or not."""
        return [make_block(index, name, module, self._storage) for index, (name, module) in enumerate(self.blocks.items())]

    def empty(self, index: int) -> Block:
        """A block with weights of no particular value, to be filled."""
        name, module = list(self.blocks.items())[index]
        for path, parameter in list(module.named_parameters()):
            value = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
            set_module_tensor_to_device(self.model, f"{name}.{path}", self.device, value)
        return make_block(index, name, module, self._storage)

    def stand_in(self) -> PreTrainedModel:
        """The whole model with weights of no value, which takes as long as any other."""
        generator = torch.Generator(self.device).manual_seed(0)
        for name, parameter in list(self.model.named_parameters()):
            value = torch.empty(parameter.shape, dtype=self.dtype, device=self.device).normal_(std=0.02, generator=generator)
            set_module_tensor_to_device(self.model, name, self.device, value)
        self.model.tie_weights()
        return self.model

    def release(self, index: int) -> None:
        """Give back the memory of a block's weights."""
        for name in self.inside(list(self.blocks)[index]):
            set_module_tensor_to_device(self.model, name, "meta")


def _resized(part: Part, after: torch.Size, before: torch.Size) -> Part:
    """The part of a smaller parameter that a part of the larger one becomes."""

    def scaled(end: int | None, axis: int) -> int | None:
        return None if end is None else end * after[axis] // before[axis]

    return tuple(
        slice(scaled(one.start, axis), scaled(one.stop, axis), one.step) if isinstance(one, slice) else one
        for axis, one in enumerate(part)
    )
