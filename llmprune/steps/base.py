"""What a step of a run is: from the folder of a model to the folder of a smaller or sparser one, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.models.names import Names
from llmprune.models.skeleton import Skeleton
from llmprune.output.resume import Manifest
from llmprune.stream.engine import Source
from llmprune.stream.source import CheckpointSource


@dataclass(frozen=True, slots=True)
class Work:
    """The model that a step works on, on disk or in memory alike.

    Attributes:
        parameters: how many there are; `nbytes` of all tensors.
        outside: makes what is outside the blocks (embeddings, head) available for a while.
        names: where on disk the model's tensors are; nothing for a model in memory.
        scratch: a folder whose disk is to hold the hidden states; None: memory holds them.
    """

    model: PreTrainedModel
    blocks: Mapping[str, nn.Module]
    device: torch.device
    dtype: torch.dtype
    parameters: int
    nbytes: int
    source: Source
    outside: Callable[[], AbstractContextManager[None]] = nullcontext
    names: Names = field(default_factory=dict)
    scratch: Path | None = None

    @classmethod
    def on_disk(cls, skeleton: Skeleton, scratch: Path | None) -> Work:
        """The model of a checkpoint."""
        return cls(
            skeleton.model,
            skeleton.blocks,
            skeleton.device,
            skeleton.dtype,
            skeleton.parameters(),
            skeleton.checkpoint.nbytes(),
            CheckpointSource(skeleton),
            skeleton.outside,
            skeleton.names,
            scratch,
        )


class Step(Protocol):
    """A step of a run, made ready.

    Attributes:
        title: of what is asked, in the header.
        skipped: matrices that are left alone, and why.
    """

    title: str
    skipped: Mapping[str, str]

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        """Raises: InputError: what is asked is not possible with the model of `skeleton`."""
        ...

    def __str__(self) -> str:
        """What is asked, in words."""
        ...

    def probed(self, texts: Texts) -> int:
        """Calibration tokens that are followed through the model besides the windows."""
        ...

    def run(self, texts: Texts, record: RunRecord, into: Path, manifest: Manifest | None) -> None:
        """Write the model's new folder, all but its card and record, and fill in `record`.

        Args:
            manifest: of the run's unfinished output, on the process that writes; None: nothing is written. What an earlier run
                finished is in `into`.
        """
        ...
