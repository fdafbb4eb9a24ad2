"""The protocol of a cost: a module with its title and one pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedModel

from llmprune.models.sites import Block


class Cost(Protocol):
    """What every module of `footprint.COSTS` has."""

    NAME: str  # in the record
    TITLE: str  # where people read it

    def measure(self, model: PreTrainedModel, blocks: Sequence[Block]) -> int | None:
        """Of a model whose weights may be on the meta device; None where its configuration does not say."""
        ...
