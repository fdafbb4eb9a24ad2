"""Train a pruned model block by block, towards the dense model's hidden states, with one block of each in memory.

The pruned model's own hidden states are a block's inputs, the dense model's its target, so that a block also takes back what
those before it lost (pruned inputs and dense targets: Wagner et al., "A free lunch in LLM compression", 2025).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.base.clock import Clock
from llmprune.base.processes import Ranks
from llmprune.data.windows import Windows
from llmprune.job.progress import Progress
from llmprune.job.record import Perplexity, Reconstruction
from llmprune.measure.perplexity import streamed_perplexity
from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton
from llmprune.output.resume import Manifest
from llmprune.output.shards import ShardWriter
from llmprune.steps.base import Feeds, Keeper, Resume, Work
from llmprune.steps.fitting import fit_block
from llmprune.stream.activations import Activations
from llmprune.stream.engine import stream


@dataclass(frozen=True, slots=True)
class Twins:
    """A pruned model and the dense one, on disk.

    Attributes:
        layers: the dense model's block that each of the pruned model's was.
        sparse: names of the pruned matrices; their zeros stay.
    """

    pruned: Skeleton
    dense: Skeleton
    layers: Sequence[int]
    sparse: Collection[str]


@dataclass(frozen=True, slots=True)
class Shared:
    """How the work is done.

    Attributes:
        batch: windows that this process runs at once.
        scratch: a folder whose disk is to hold the hidden states; None: memory holds them.
    """

    batch: int
    ranks: Ranks
    clock: Clock
    progress: Progress
    scratch: Path | None


@dataclass(slots=True)
class BlockTraining:
    """What came of it.

    Attributes:
        fits: one a block, in order.
        dense, before, after: perplexities, where there is a text to evaluate on.
    """

    fits: list[Reconstruction] = field(default_factory=list)
    dense: Perplexity | None = None
    before: Perplexity | None = None
    after: Perplexity | None = None

    def report(self, block: Block) -> Mapping[str, Any]:
        return asdict(self.fits[block.index])


@torch.no_grad()
def train_blocks(
    twins: Twins, training: Windows, evaluation: Windows | None, shared: Shared, into: Path, manifest: Manifest | None
) -> BlockTraining:
    """Train, and write the blocks into the folder `into`, with what is outside them; goes on from those that are there.

    Args:
        manifest: of that folder, on the process that writes.
    """
    ranks, found, edited = shared.ranks, BlockTraining(), set[str]()
    pruned, dense = (Work.on_disk(own, shared.scratch) for own in (twins.pruned, twins.dense))
    share = evaluation.share(ranks.rank, ranks.size) if evaluation else None
    feeds = [_start(own, training.share(ranks.rank, ranks.size), shared) for own in (pruned, dense)]
    evaluated = [_start(own, share, shared) for own in (pruned, dense)] if share else []
    before = evaluated[0].fork() if evaluated else None
    writer = ShardWriter(twins.pruned, into, edited)
    finished = ranks.agree(manifest.blocks if manifest else [])
    resume = Resume(finished, writer, manifest)
    others = _dense_blocks(dense, twins.layers)

    def visit(block: Block) -> None:
        if before is not None:
            with shared.clock("evaluate"):
                before.advance(block)
        for other in next(others):
            with shared.clock("forward"):
                feeds[1].advance(other)
            for own in evaluated[1:]:
                with shared.clock("evaluate"):
                    own.advance(other)
        if resume.has(block):
            writer.restore(block)
            found.fits.append(Reconstruction(**finished[block.index]))
            return shared.progress.repeated(0)
        with shared.clock("train"):
            fit, changed = fit_block(block, kept(block, twins.sparse), feeds[0], feeds[1].hidden, ranks)
        edited.update(changed)
        found.fits.append(fit)
        shared.progress.reconstructed(fit)

    shared.progress.start(len(pruned.blocks), 0)
    onward = Feeds(feeds[0], evaluated[0] if evaluated else None, len(pruned.blocks) - 1, shared.progress, shared.clock)
    stream(pruned.source, onward, Keeper(shared.clock, found.report, resume), visit)
    if share and before:
        streams = ((dense, evaluated[1]), (pruned, before), (pruned, evaluated[0]))
        found.dense, found.before, found.after = (_perplexity(*own, share, shared) for own in streams)
    if manifest:
        writer.finish()
    return found


def kept(block: Block, sparse: Collection[str]) -> dict[str, Tensor]:
    """Masks of the block's matrices by name, (out, in): what is not zero of the pruned ones, all of the others."""
    return {
        site.name: site.weight != 0 if site.name in sparse else torch.ones_like(site.weight, dtype=torch.bool)
        for site in block.sites
    }


def _start(work: Work, windows: Windows, shared: Shared) -> Activations:
    with work.outside(), shared.clock("capture"):
        return work.record(windows, shared.batch)


def _dense_blocks(dense: Work, layers: Sequence[int]) -> Iterator[Iterator[Block]]:
    """For each of the pruned model's blocks, those of the dense model up to the one that its next block was."""
    blocks, ends = dense.source.blocks(), [*layers[1:], len(dense.blocks)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield (next(blocks) for _ in range(start, end))


def _perplexity(work: Work, last: Activations, windows: Windows, shared: Shared) -> Perplexity:
    with work.outside(), shared.clock("evaluate"):
        blocks = list(work.blocks.values())
        return streamed_perplexity(work.model, blocks, last, windows, work.device, shared.ranks)
