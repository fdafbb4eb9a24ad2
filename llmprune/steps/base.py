"""What a step of a run is: from the folder of a model to the folder of a smaller or sparser one, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.base.clock import Clock
from llmprune.data.windows import Texts, Windows
from llmprune.job.job import Job
from llmprune.job.progress import Progress
from llmprune.job.recipes import Recipe
from llmprune.job.record import RunRecord
from llmprune.models.names import Names
from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton
from llmprune.output.resume import Manifest
from llmprune.output.shards import ShardWriter
from llmprune.stream.activations import Activations
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

    def record(self, windows: Windows, batch: int) -> Activations:
        """The windows as the first block is given them, `batch` at a time; what is `outside` must be there."""
        blocks = list(self.blocks.values())
        return Activations.record(self.model, blocks, windows, batch=batch, device=self.device, folder=self.scratch)


@dataclass(frozen=True, slots=True)
class Load:
    """What a step asks of the machine beyond its passes over the calibration windows.

    Attributes:
        recipe: what it does to each block, where that is not what the job prunes by.
        evaluates: it runs the evaluation text, too.
        probed: calibration tokens that are followed through the model besides the windows.
        scanned: patterns at which each matrix's error is measured first; 0: there is no scan.
        minutes: that a search for patterns takes at most, and `kept`: bytes that it keeps on the disk meanwhile.
        gathered: bytes of what it gathers from all blocks, and `operations`: those on it, of floating point.
    """

    recipe: Recipe | None = None
    evaluates: bool = True
    probed: int = 0
    scanned: int = 0
    minutes: int = 0
    kept: int = 0
    gathered: int = 0
    operations: float = 0.0


class Step(Protocol):
    """A step of a run, made ready.

    Attributes:
        title: of what is asked, in the header.
        skipped: matrices that are left alone, and why.
    """

    title: ClassVar[str]
    skipped: Mapping[str, str] = MappingProxyType({})

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        """Raises: InputError: what is asked is not possible with the model of `skeleton`."""
        ...

    def __str__(self) -> str:
        """What is asked, in words."""
        ...

    def load(self, texts: Texts) -> Load:
        """What it will ask of the machine."""
        return Load()

    def run(self, texts: Texts, record: RunRecord, into: Path, manifest: Manifest | None) -> None:
        """Write the model's new folder, all but its card and record, and fill in `record`.

        Args:
            manifest: of `into`, on the process that writes; None: nothing is written. It has what an earlier run finished.
        """
        ...


@dataclass(frozen=True, slots=True)
class Resume:
    """What came of the blocks that an earlier run finished, where they are, and where to commit those that come."""

    finished: Sequence[Mapping[str, Any]]
    writer: ShardWriter
    manifest: Manifest | None

    def has(self, block: Block) -> bool:
        return block.index < len(self.finished)

    @classmethod
    def of(cls, job: Job, manifest: Manifest | None, writer: ShardWriter) -> Resume:
        """What all processes agree on; counts the time that the earlier run took."""
        finished = job.ranks.agree(manifest.blocks if manifest else [])
        if finished:
            job.clock.add(finished[-1]["seconds"])
        return cls(finished, writer, manifest)


@dataclass(frozen=True, slots=True)
class Keeper:
    """A `Sink` that writes each block, unless an earlier run did, and commits what came of it, as `report` says. On a process
    that does not write, or of a model in memory, it keeps nothing."""

    clock: Clock
    report: Callable[[Block], Mapping[str, Any]]
    resume: Resume | None

    def put(self, block: Block) -> None:
        if self.resume and self.resume.has(block):
            return
        with self.clock("write"):
            if self.resume and self.resume.manifest:
                self.resume.writer.put(block)
                report = {**self.report(block), "seconds": self.clock.seconds}
                self.resume.manifest.commit(self.resume.writer.shard(block), report)


class Nowhere:
    """A `Sink` that keeps no block."""

    def put(self, block: Block) -> None: ...


@dataclass(frozen=True, slots=True)
class Feeds:
    """A `Feed` that advances the calibration stream, up to the inputs of block `last`, and the evaluation stream, if any."""

    calibration: Activations
    evaluation: Activations | None
    last: int
    progress: Progress
    clock: Clock

    def advance(self, block: Block) -> None:
        if block.index < self.last:
            with self.clock("forward"):
                self.calibration.advance(block)
        if self.evaluation is not None:
            with self.clock("evaluate"):
                self.evaluation.advance(block)
        self.progress.block(block.index)
