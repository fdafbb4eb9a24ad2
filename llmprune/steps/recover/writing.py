"""A trained model back to a folder: what was trained in the dtypes that it is stored in, all else bit for bit as it was."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks, make_block
from llmprune.models.names import Names
from llmprune.models.skeleton import Skeleton
from llmprune.output.shards import ShardWriter


@dataclass(frozen=True, slots=True)
class _Trained:
    """A `Layout`: a model in memory that was read from where `source` is."""

    source: Skeleton
    blocks: Mapping[str, nn.Module]

    @property
    def names(self) -> Names:
        return self.source.names

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    def inside(self, block: str) -> list[str]:
        return self.source.inside(block)

    def outside_on_disk(self) -> dict[str, int]:
        return self.source.outside_on_disk()


def write_trained(model: PreTrainedModel, source: Skeleton, trained: Collection[str], folder: Path) -> None:
    """Write the blocks' shards, what is outside them, and the index."""
    blocks, storage = find_blocks(model), source.storage()
    writer = ShardWriter(_Trained(source, blocks), folder, set(trained))
    for index, (name, module) in enumerate(blocks.items()):
        writer.put(make_block(index, name, module, storage))
    writer.finish()
