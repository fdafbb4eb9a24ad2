"""The protocol of a cost: a module with its title and one pure function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton
from llmprune.models.target import Target


@dataclass(frozen=True, slots=True)
class Sized:
    """A model whose weights may be on the meta device.

    Attributes:
        outside: bytes on disk of the tensors that are in no block.
        storage: the dtype on disk of each parameter, by full name.
    """

    model: PreTrainedModel
    blocks: Sequence[Block]
    outside: int
    storage: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, model: Skeleton | Target) -> Sized:
        return cls(model.model, model.describe(), sum(model.outside_on_disk().values()), model.storage())


class Cost(Protocol):
    """What every module of `footprint.COSTS` has."""

    NAME: str  # in the record
    TITLE: str  # where people read it

    def measure(self, whole: Sized) -> int | None:
        """Of a model; None where its configuration does not say."""
        ...


class OfBlocks(Cost, Protocol):
    """A cost that is the sum of the blocks' and of what is outside them: a budget can be kept of it."""

    def of_block(self, model: PretrainedConfig, block: Block) -> int:
        """A block's part."""
        ...
