"""The step that permutes channels: look at the dense model once, then copy its checkpoint in the new order."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from llmprune.base.errors import InputError
from llmprune.base.notation import DEALT_OUT
from llmprune.base.words import count
from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.record import RunRecord, permutation_text
from llmprune.models.extras import copy_extras
from llmprune.models.skeleton import Skeleton
from llmprune.numerics.patterns import NM
from llmprune.output.resume import Manifest
from llmprune.output.shards import ShardWriter
from llmprune.steps.base import Step, Work
from llmprune.steps.permute.looking import Looked, Looking
from llmprune.steps.permute.moves import Moved, moved
from llmprune.steps.weights.step import choose


class PermuteChannels(Step):
    """A `Step`: put neurons, channels of values and hidden channels in an order in which an N:M mask costs less."""

    title = "order"

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        self._job, self._skeleton, self._work = job, skeleton, Work.on_disk(skeleton, scratch)
        self._pattern = grouped(job)
        self._sites = frozenset(choose(job, skeleton.describe()).patterns)

    def __str__(self) -> str:
        return f"of channels, for {self._pattern} in {count(len(self._sites), 'matrix')}"

    def run(self, texts: Texts, record: RunRecord, into: Path, manifest: Manifest | None) -> None:
        job, skeleton = self._job, self._skeleton
        outside = skeleton.outside_blocks()
        found = Looking(job, self._work, skeleton.describe, outside, self._pattern, self._sites).look(texts.calibration)
        tell(found, job, record)
        record.peak_memory = job.clock.peaks()
        if manifest:
            with job.clock("write"):
                writer = ShardWriter(Moved(skeleton, found.moves), into, set())
                for block in skeleton.describe():
                    writer.put(block)
                writer.finish()
                copy_extras(skeleton.checkpoint.folder, into)


def grouped(job: Job) -> NM:
    """The pattern that channels are permuted for.

    Raises:
        InputError: its groups are too large.
    """
    assert isinstance(job.pattern, NM)
    if job.pattern.m > DEALT_OUT:
        raise InputError(f"permute is for groups of at most {DEALT_OUT}, and those of {job.pattern} are larger: leave it out")
    return job.pattern


def permute_in_memory(job: Job, work: Work, texts: Texts, sites: Collection[str], record: RunRecord) -> None:
    """Permute the channels of a model in place."""
    blocks = list(work.source.blocks())
    outside = [
        name for name, _ in work.model.named_parameters() if not name.startswith(tuple(f"{own}." for own in work.blocks))
    ]
    found = Looking(job, work, lambda: blocks, outside, grouped(job), frozenset(sites)).look(texts.calibration)
    tell(found, job, record)
    for name, moves in found.moves.items():
        parameter = work.model.get_parameter(name)
        parameter.data.copy_(moved(parameter.data, moves))


def tell(found: Looked, job: Job, record: RunRecord) -> None:
    """Record what was found, and say it.

    Raises:
        InputError: nothing can be permuted.
    """
    if not found.costs:
        what, why = next(iter(found.left.items()))
        raise InputError(f"no channels of this model can be permuted ({what}: {why}): pass --no-permute")
    costs = {kind: {"before": before, "after": after} for kind, (before, after) in found.costs.items()}
    record.permuted = {"costs": costs, "left": found.left}
    job.progress.note(permutation_text(record.permuted))
