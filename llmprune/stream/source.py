"""Where blocks come from: a model in memory, or a checkpoint folder, one block alive at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from llmprune.base.hardware import return_free_memory
from llmprune.models.discover import find_blocks, make_block
from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton


class ModelSource:
    """Blocks of a model in memory; they are edited in place."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._blocks = find_blocks(model)
        self._storage = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}

    def blocks(self) -> Iterator[Block]:
        for index, (name, module) in enumerate(self._blocks.items()):
            yield make_block(index, name, module, self._storage)


class CheckpointSource:
    """Blocks of a checkpoint: read when asked for, released when the next one is."""

    def __init__(self, skeleton: Skeleton, layers: Sequence[int] | None = None) -> None:
        """Of the blocks numbered in `layers` only, which are numbered anew, if any are named."""
        self._skeleton, self._layers = skeleton, layers

    def blocks(self) -> Iterator[Block]:
        blocks = self._skeleton.describe()
        for index, layer in enumerate(range(len(blocks)) if self._layers is None else self._layers):
            block = replace(blocks[layer], index=index)
            return_free_memory()
            self._skeleton.fill(self._skeleton.inside(block.name))
            yield block
            self._skeleton.release(self._skeleton.inside(block.name))
