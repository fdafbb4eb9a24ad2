"""The steps of a run, in order, and where each of them writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmprune.base.files import RECORD, read_json
from llmprune.base.folders import existing_parent, settle
from llmprune.base.hardware import map_large_allocations, pick_device, pick_dtype
from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.resolve import ModelFolder
from llmprune.models.skeleton import Skeleton, load_config
from llmprune.output.resume import Manifest, between_folders, partial_folder
from llmprune.output.write import write_record
from llmprune.runs.announce import announce
from llmprune.runs.fingerprint import fingerprint
from llmprune.runs.preflight import predict
from llmprune.runs.texts import choose_texts
from llmprune.steps.base import Step, Work
from llmprune.steps.channels.step import PermuteChannels, RotateChannels, changes
from llmprune.steps.quantise.step import QuantiseWeights
from llmprune.steps.structured.step import RemoveStructure
from llmprune.steps.weights.step import PruneWeights

_LARGE_TENSOR = 4 * 2**20  # bytes


def schedule(job: Job, output: Path) -> list[Stage]:
    """What `job` asks for: structure is removed first, then channels rotated and permuted, weights pruned, and those
    that are left rounded.

    Raises:
        InputError: channels cannot be changed for such a pattern.
    """
    asked: list[tuple[Job, type[Step]]] = []
    if job.config.structured:
        asked.append((job, RemoveStructure))
    for step in changes(job):
        asked.append((job.weights_only(output) if asked else job, step))
    if job.config.sparse:
        asked.append((job.weights_only(output) if asked else job, PruneWeights))
    if job.config.bits:
        asked.append((job.quantise_only(output) if asked else job, QuantiseWeights))
    folders = [*between_folders(output)[: len(asked) - 1], partial_folder(output)]
    return [Stage(own, kind, output, into) for (own, kind), into in zip(asked, folders, strict=True)]


@dataclass(frozen=True, slots=True)
class Stage:
    """A step where it stands in a run.

    Attributes:
        job: as the step is to see it.
        into: the folder that it writes; that of the last one is published as `output`.
    """

    job: Job
    kind: type[Step]
    output: Path
    into: Path

    @property
    def told(self) -> str:
        """What it makes, where that is on the way."""
        told: dict[type[Step], str] = {
            RemoveStructure: "the smaller model",
            RotateChannels: "the rotated model",
            PermuteChannels: "the permuted model",
        }
        return told.get(self.kind, "the pruned model")

    @property
    def last(self) -> bool:
        return self.into == partial_folder(self.output)

    def begin(self, place: ModelFolder, tokenizer: PreTrainedTokenizerBase | None) -> Begun:
        """Look at the model in `place` without its weights, choose texts, and say what is about to be done.

        Raises:
            InputError: it is not possible, or the disk has too little room for it.
        """
        job, config = self.job, load_config(place.path)
        with job.clock("prepare"):
            device = pick_device(job.config.device, job.ranks.local)
            checkpoint = Checkpoint(place.path)
            if checkpoint.largest() > _LARGE_TENSOR:
                map_large_allocations()
            dtype, why = job.ranks.agree(pick_dtype(job.config.dtype, device, config))
            skeleton = Skeleton(checkpoint, config, device, dtype)
            scratch = existing_parent(self.output) if job.config.activations == "disk" else None
            step, work = self.kind(job, skeleton, scratch), Work.on_disk(skeleton, scratch)
            texts = choose_texts(job.config, config, tokenizer, given=job.given, bundled=place.bundled)
            predicted = predict(job, work, config, skeleton.describe(), texts, self.output, step)
        said = {"title": step.title, "asked": str(step), "why": why}
        record = announce(job, work, texts, place, **said, skipped=step.skipped, predicted=predicted)
        return Begun(self, step, checkpoint, texts, record)


@dataclass(frozen=True, slots=True)
class Begun:
    """A step that is about to work."""

    stage: Stage
    step: Step
    checkpoint: Checkpoint
    texts: Texts
    record: RunRecord

    def fingerprint(self) -> dict[str, Any]:
        """Of the run that begins with this step."""
        return fingerprint(self.stage.job, self.checkpoint, self.texts, self.record)

    def run(self, earlier: RunRecord | None, manifest: Manifest | None) -> RunRecord:
        """Write the step's folder whole, unless an earlier run has; returns its record, which starts where `earlier` does.

        Args:
            manifest: of the run's unfinished output, on the process that writes.
        """
        job, into, record = self.stage.job, self.stage.into, self.record
        if not self.stage.last and job.ranks.agree((into / RECORD).is_file()):
            job.progress.note(f"{self.stage.told} is there from an earlier run")
            return RunRecord.read(read_json(into / RECORD))
        own = manifest
        if manifest and not self.stage.last:
            into.mkdir(mode=0o700, exist_ok=True)
            own = manifest.on_the_way(into)
            if own.blocks:
                job.progress.note(f"going on after block {len(own.blocks)} of {self.stage.told}, which an earlier run finished")
        self.step.run(self.texts, record, into, own)
        if earlier:
            record.follow(earlier)
        if manifest:
            with job.clock("write"):
                write_record(into, record, self.stage.output.name)
            if not self.stage.last:
                settle(into)
                manifest.begin()
        job.ranks.agree(None)
        return record
