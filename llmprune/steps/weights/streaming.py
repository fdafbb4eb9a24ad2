"""Stream a model through a visitor of its blocks, with a text to evaluate on beside the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

from llmprune.base.errors import InputError
from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.record import RunRecord
from llmprune.measure.perplexity import streamed_perplexity
from llmprune.models.experts import observable
from llmprune.models.sites import Block
from llmprune.steps.base import Feeds, Keeper, Resume, Work
from llmprune.stream.activations import Activations
from llmprune.stream.engine import stream


class Visitor(Protocol):
    """What changes a block's matrices.

    Attributes:
        done: what it does, in a word.
        records: of what it has changed.
        uncalled: sites that the model's forward never runs.
    """

    done: ClassVar[str]

    @property
    def records(self) -> list[Any]: ...

    @property
    def uncalled(self) -> list[str]: ...

    def visit(self, block: Block) -> None: ...

    def repeat(self, block: Block, report: Mapping[str, Any], restore: Callable[[Block], None]) -> None:
        """Instead of `visit`, for a block that an earlier run has done: `restore` gives it the weights of then."""
        ...

    def report(self, block: Block) -> Mapping[str, Any]:
        """What came of a block, for `repeat`."""
        ...


V = TypeVar("V", bound=Visitor)


def stream_through(
    job: Job, work: Work, texts: Texts, record: RunRecord, make: Callable[[Activations], V], sites: int, resume: Resume | None
) -> V:
    """Visit the blocks in order, and fill in perplexities before and after, what was never run, and peak memory.

    Args:
        make: the visitor, of the calibration tokens as the changed model sees them.
        sites: how many matrices are to be changed.

    Raises:
        InputError: none was.
    """
    clock, ranks, blocks = job.clock, job.ranks, list(work.blocks.values())
    batch = job.batch(texts.calibration.ids.shape[1], work.device)

    share = texts.evaluation.share(ranks.rank, ranks.size) if texts.evaluation else None
    with work.outside(), clock("capture"):
        feed = work.record(texts.calibration.share(ranks.rank, ranks.size), batch)
        before = work.record(share, batch) if share else None
    after = before.fork() if before else None
    visitor = make(feed)

    def visit(block: Block) -> None:
        if before is not None:
            with clock("evaluate"):
                before.advance(block)
        if resume and resume.has(block):
            visitor.repeat(block, resume.finished[block.index], resume.writer.restore)
        else:
            visitor.visit(block)

    job.progress.start(len(blocks), sites)
    with observable(work.model, all_tokens=job.config.all_experts):
        feeds = Feeds(feed, after, len(blocks) - 1, job.progress, clock)
        stream(work.source, feeds, Keeper(clock, visitor.report, resume), visit)
    if not visitor.records:
        raise InputError(f"nothing was {visitor.done}: the model's forward runs none of the chosen sites")
    if share and before and after:
        with work.outside(), clock("evaluate"):
            record.dense = streamed_perplexity(work.model, blocks, before, share, work.device, ranks)
            record.pruned = streamed_perplexity(work.model, blocks, after, share, work.device, ranks)
    record.skipped |= dict.fromkeys(visitor.uncalled, "the model's forward never runs it")
    record.peak_memory = clock.peaks()
    return visitor
