"""The steps that permute or rotate channels: look at the dense model once, then copy its checkpoint as changed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from llmprune.base.errors import InputError
from llmprune.base.files import RECORD, read_json, write_json
from llmprune.base.notation import DEALT_OUT
from llmprune.base.words import count
from llmprune.data.windows import Texts
from llmprune.job.channels import PERMUTED, ROTATED, channels_text
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.models.extras import copy_extras
from llmprune.models.skeleton import Skeleton
from llmprune.numerics.patterns import NM, Unstructured
from llmprune.numerics.rotation import Anywhere, Mask, Neighbours
from llmprune.output.resume import Manifest
from llmprune.output.shards import ShardWriter
from llmprune.steps.base import Load, Step, Work
from llmprune.steps.channels.folding import free_head
from llmprune.steps.channels.looking import Looked, Looking
from llmprune.steps.channels.moves import Moved, moved
from llmprune.steps.channels.permuting import Permuting
from llmprune.steps.channels.rotating import Rotating
from llmprune.steps.weights.step import choose


class _ChangeChannels(Step):
    """A `Step`: put channels on another basis, on which a mask costs less.

    Attributes:
        kind: what becomes of them; `asked`: the option's name.
        looking: what finds the basis.
    """

    kind: ClassVar[str]
    asked: ClassVar[str]
    looking: ClassVar[type[Looking]]

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        self._job, self._skeleton, self._work = job, skeleton, Work.on_disk(skeleton, scratch)
        self._mask = mask_of(job, self.kind)
        blocks = skeleton.describe()
        self._sites = frozenset(choose(job, blocks).patterns)
        self._load = self.looking.load(blocks, skeleton.model.config.get_text_config().hidden_size)

    def __str__(self) -> str:
        return f"of channels, for {self._job.pattern} in {count(len(self._sites), 'matrix')}"

    def load(self, texts: Texts) -> Load:
        return self._load

    def run(self, texts: Texts, record: RunRecord, into: Path, manifest: Manifest | None) -> None:
        job, skeleton = self._job, self._skeleton
        outside = skeleton.outside_blocks()
        looking = self.looking(job, self._work, skeleton.describe, outside, self._sites, self._mask)
        found = looking.look(texts.calibration)
        self.tell(found, self._work, job, record)
        record.peak_memory = job.clock.peaks()
        if manifest:
            with job.clock("write"):
                writer = ShardWriter(Moved(skeleton, found.moves, found.copies), into, set())
                for block in skeleton.describe():
                    writer.put(block)
                writer.finish()
                copy_extras(skeleton.checkpoint.folder, into)
                if found.copies:
                    untie(into)

    @classmethod
    def tell(cls, found: Looked, work: Work, job: Job, record: RunRecord) -> None:
        """Record what was found, and say it.

        Raises:
            InputError: nothing can be changed that was asked for by name; a preset goes on without.
        """
        if not found.costs and getattr(job.config, cls.asked):
            why = next((f" ({what}: {why})" for what, why in found.left.items()), "")
            raise InputError(f"no channels of this model can be {cls.kind}{why}: leave --{cls.asked} out")
        costs = {own: {"before": before, "after": after} for own, (before, after) in found.costs.items()}
        added = sum(work.model.get_parameter(of).numel() for of in found.copies.values())
        record.channels[cls.kind] = {"costs": costs, "left": found.left, "added": added}
        job.progress.note(channels_text(cls.kind, record.channels[cls.kind]))


class RotateChannels(_ChangeChannels):
    """Rotate hidden channels, or else those of values."""

    title, kind, asked, looking = "rotation", ROTATED, "rotate", Rotating

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        super().__init__(job, skeleton, scratch)
        folder = skeleton.checkpoint.folder
        if (folder / RECORD).is_file() and read_json(folder / RECORD).get("sites"):
            raise InputError(f"{folder} is pruned already, and rotated channels would fill its zeros: pass --no-rotate")


class PermuteChannels(_ChangeChannels):
    """Put neurons, channels of values and hidden channels in an order in which an N:M mask costs less."""

    title, kind, asked, looking = "order", PERMUTED, "permute", Permuting


def changes(job: Job) -> list[type[_ChangeChannels]]:
    """The steps that the job asks for, in order.

    Raises:
        InputError: one cannot be done for its pattern.
    """
    for kind in job.recipe.changes:
        mask_of(job, kind)
    return [step for step in (RotateChannels, PermuteChannels) if step.kind in job.recipe.changes]


def mask_of(job: Job, kind: str) -> Mask:
    """What the pattern drops; of a group that is too large to compare all ways, as if it could be anywhere.

    Raises:
        InputError: channels are not permuted for such a pattern.
    """
    pattern = job.pattern
    assert isinstance(pattern, NM | Unstructured)
    if isinstance(pattern, Unstructured):
        return Anywhere(pattern.sparsity)
    if pattern.m <= DEALT_OUT:
        return Neighbours(pattern.m, pattern.m - pattern.n)
    if kind == PERMUTED:
        raise InputError(f"permute is for groups of at most {DEALT_OUT}, and those of {pattern} are larger: leave it out")
    return Anywhere(1 - pattern.n / pattern.m)


def change_in_memory(job: Job, work: Work, texts: Texts, sites: Collection[str], record: RunRecord) -> None:
    """Put the channels of a model on another basis, as the job asks, in place."""
    for step in changes(job):
        inside = tuple(f"{own}." for own in work.blocks)
        outside = [name for name, _ in work.model.named_parameters() if not name.startswith(inside)]
        mask = mask_of(job, step.kind)
        looking = step.looking(job, work, lambda: list(work.source.blocks()), outside, frozenset(sites), mask)
        found = looking.look(texts.calibration)
        step.tell(found, work, job, record)
        if found.copies:
            free_head(work.model)
            work.model.config.tie_word_embeddings = work.model.config.get_text_config().tie_word_embeddings = False
        for name, moves in found.moves.items():
            parameter = work.model.get_parameter(name)
            parameter.data.copy_(moved(parameter.data, moves))


def untie(folder: Path) -> None:
    """Say in the configuration that the head has a matrix of its own."""
    config = read_json(folder / "config.json")
    inner = [own for own in config.values() if isinstance(own, dict) and "tie_word_embeddings" in own]
    for own in (config, *inner):
        own["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
