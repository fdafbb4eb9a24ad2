"""The step that quantises: stream the model's blocks, round each one's matrices, evaluate along the way, fill in the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.data.windows import Texts, Windows
from llmprune.formats.quantised import quantisation_config, write_config
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.measure.perplexity import streamed_perplexity
from llmprune.models.experts import observable
from llmprune.models.extras import copy_extras
from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton
from llmprune.output.resume import Manifest
from llmprune.output.shards import ShardWriter
from llmprune.steps.base import Feeds, Keeper, Resume, Work
from llmprune.steps.quantise.plan import plan
from llmprune.steps.quantise.rounding import ROUNDINGS
from llmprune.steps.quantise.visitor import Quantiser
from llmprune.steps.weights.selection import EVERY, select
from llmprune.stream.activations import Activations
from llmprune.stream.engine import stream


class QuantiseWeights:
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

    def probed(self, texts: Texts) -> int:
        return 0

    def scanned(self) -> int:
        return 0

    def searched(self) -> tuple[int, int]:
        return 0, 0

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
        clock, ranks, blocks = job.clock, job.ranks, list(work.blocks.values())
        batch = job.batch(texts.calibration.ids.shape[1], work.device)

        def start(windows: Windows) -> Activations:
            return Activations.record(work.model, blocks, windows, batch=batch, device=work.device, folder=work.scratch)

        share = texts.evaluation.share(ranks.rank, ranks.size) if texts.evaluation else None
        with work.outside(), clock("capture"):
            feed = start(texts.calibration.share(ranks.rank, ranks.size))
            before = start(share) if share else None
        after = before.fork() if before else None
        quantiser = Quantiser(
            self._plan,
            self._rounding,
            feed,
            feed.fork() if self._rounding.corrected else None,
            texts.calibration.tokens(),
            len(blocks) - 1,
            job.progress,
            clock,
            ranks,
            work.names,
            edited,
            coded,
        )

        def visit(block: Block) -> None:
            if before is not None:
                with clock("evaluate"):
                    before.advance(block)
            if resume.has(block):
                quantiser.repeat(block, resume.finished[block.index], resume.writer.restore)
            else:
                quantiser.quantise(block)

        job.progress.start(len(blocks), len(self._plan.grids))
        with observable(work.model, all_tokens=job.config.all_experts):
            feeds = Feeds(feed, after, len(blocks) - 1, job.progress, clock)
            stream(work.source, feeds, Keeper(clock, quantiser.report, resume), visit)
        if not quantiser.records:
            raise InputError("nothing was quantised: the model's forward runs none of the chosen sites")
        if share and before and after:
            with work.outside(), clock("evaluate"):
                record.dense = streamed_perplexity(work.model, blocks, before, share, work.device, ranks)
                record.pruned = streamed_perplexity(work.model, blocks, after, share, work.device, ranks)
        record.codes = quantiser.records
        record.skipped |= dict.fromkeys(quantiser.uncalled, "the model's forward never runs it")
        record.peak_memory = clock.peaks()
