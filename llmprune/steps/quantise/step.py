"""The step that quantises: stream the model's blocks, round each one's matrices, evaluate along the way, fill in the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llmprune.data.windows import Texts
from llmprune.formats.quantised import quantisation_config, write_config
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.models.extras import copy_extras
from llmprune.models.skeleton import Skeleton
from llmprune.output.resume import Manifest
from llmprune.output.shards import ShardWriter
from llmprune.steps.base import Resume, Step, Work
from llmprune.steps.quantise.plan import plan
from llmprune.steps.quantise.rounding import ROUNDINGS
from llmprune.steps.quantise.visitor import Quantiser
from llmprune.steps.weights.selection import EVERY, select
from llmprune.steps.weights.streaming import stream_through
from llmprune.stream.activations import Activations


class QuantiseWeights(Step):
    """A `Step`: round what is left of the weights to codes. Goes on from the last block that an earlier run finished."""

    title = "codes"

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        assert job.config.bits is not None
        self._job, self._skeleton, self._work = job, skeleton, Work.on_disk(skeleton, scratch)
        chosen = select(skeleton.describe(), EVERY, only=job.config.only, skip=job.config.skip)
        self._plan = plan(skeleton, job.config.bits, job.config.group_size, chosen.skipped)
        self._rounding = ROUNDINGS.get(job.config.rounding)
        self.skipped: Mapping[str, str] = chosen.skipped

    def __str__(self) -> str:
        return str(self._plan)

    def run(self, texts: Texts, record: RunRecord, into: Path, manifest: Manifest | None) -> None:
        job, edited, coded = self._job, set[str](), dict[str, dict[str, Tensor]]()
        bits = next(iter(self._plan.grids.values())).bits
        writer = ShardWriter(self._skeleton, into, edited, coded, bits)
        resume = Resume.of(job, manifest, writer)
        self._quantise(texts, record, edited, coded, resume)
        if manifest:
            with job.clock("write"):
                writer.finish()
                copy_extras(self._skeleton.checkpoint.folder, into)
                self._write_config(into, record)

    def _write_config(self, folder: Path, record: RunRecord) -> None:
        """Say in config.json what is stored as codes; those of matrices that the forward never runs are not."""
        coded, pools = self._plan.coded, self._plan.pools
        groups = {coded[one.name]: one.group for one in record.codes if one.coded}
        others = self._plan.others + [layer for layer in coded.values() if layer not in groups]
        if groups:
            first = next((one.group for one in record.codes if one.coded and one.name in pools), None)
            write_config(folder, quantisation_config(record.codes[0].bits, groups, others, first))

    def _quantise(
        self, texts: Texts, record: RunRecord, edited: set[str], coded: dict[str, dict[str, Tensor]], resume: Resume
    ) -> None:
        job, work = self._job, self._work

        def make(feed: Activations) -> Quantiser:
            return Quantiser(
                self._plan,
                self._rounding,
                feed,
                feed.fork() if self._rounding.corrected else None,
                texts.calibration.tokens(),
                len(work.blocks) - 1,
                job.progress,
                job.clock,
                job.ranks,
                work.names,
                edited,
                coded,
            )

        record.codes = stream_through(job, work, texts, record, make, len(self._plan.grids), resume).records
