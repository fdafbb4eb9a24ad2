"""The dense model, run block by block before anything is removed from it: what each part of it is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.data.windows import Texts, Windows
from llmprune.job.job import Job
from llmprune.job.record import Perplexity
from llmprune.measure.divergence import streamed_divergences
from llmprune.measure.perplexity import streamed_perplexity
from llmprune.models.experts import observable
from llmprune.models.groups import Group
from llmprune.models.sites import Block, Site, Stage
from llmprune.models.skeleton import Skeleton
from llmprune.steps.structured.allocate import Curve, in_nats, mean, measure
from llmprune.steps.structured.removal import choose, coupled, observe, removal_error, without
from llmprune.steps.structured.sizes import Sizes
from llmprune.steps.structured.slopes import loss_gradients, slopes
from llmprune.steps.weights.observing import Observed, blend_experts
from llmprune.stream.activations import Activations, Hidden
from llmprune.stream.source import CheckpointSource

_TRIED = 32768  # calibration tokens that models without a layer are tried on
_PROBED = 8192  # calibration tokens that what one layer loses is followed on, to the end of the model

_DROP = "layer"

Watched = dict[str, Sequence[tuple[Group, int, int]]]


@dataclass(frozen=True, slots=True)
class Ask:
    """What to find out.

    Attributes:
        ways: sizes whose error is to be known.
        watched: of a block, by kind, groups of which ever more parts are removed, how many stay at least, and with how many
            the loss is to be measured.
        drops: whether the loss without each block is to be measured too.
        consumers: of a block, those whose inputs' slopes are wanted; None: no backward pass.
    """

    ways: Sequence[Sizes]
    watched: Callable[[Block], Watched]
    drops: bool
    consumers: Callable[[Block], list[Site]] | None


@dataclass(slots=True)
class Scouted:
    """What the dense model shows.

    Attributes:
        dense: its perplexity, where a text to evaluate on is named.
        influence: of each block, 1 - mean cosine of a token's hidden state before and after it (Men et al., "ShortGPT", 2024).
        drops: of each block, KL divergence from the dense model, nats a token, of the model without it.
        errors: by way asked for, the sum over blocks of the relative error that would leave.
        curves: of each block, by kind, the same of the model that has ever more parts of it removed.
        slopes: how the loss depends on what the consumers read, by site name.
    """

    dense: Perplexity | None = None
    influence: list[float] = field(default_factory=list)
    drops: list[float] = field(default_factory=list)
    errors: dict[Sizes, float] = field(default_factory=dict)
    curves: list[dict[str, Curve]] = field(default_factory=list)
    slopes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _Probes:
    """Some windows, on their way through the dense model but for one block each, which had something removed.

    Attributes:
        kinds: what that was, for each of those on their way; of a kind there is one a block.
        gone: how many parts of a block that was, by kind.
    """

    windows: Windows
    kinds: list[str] = field(default_factory=list)
    going: list[Activations] = field(default_factory=list)
    gone: dict[str, int] = field(default_factory=dict)

    def start(self, kind: str, gone: int, at: Activations) -> Activations:
        self.kinds.append(kind)
        self.going.append(at.fork())
        self.gone[kind] = gone
        return self.going[-1]


@dataclass(frozen=True, slots=True)
class Scout:
    """Runs the dense model of `skeleton` on the texts of `job`.

    Attributes:
        scratch: a folder whose disk is to hold the hidden states; None: memory holds them.
    """

    job: Job
    skeleton: Skeleton
    texts: Texts
    scratch: Path | None

    def look(self, ask: Ask) -> Scouted:
        """One pass over the model, or one there and one back."""
        found, job = Scouted(), self.job
        feed = self.record(self.texts.calibration)
        evaluated = self.record(self.texts.evaluation) if self.texts.evaluation else None
        probes = _Probes(self._first(_PROBED))
        few, inputs = self.record(probes.windows), list[Hidden]()
        with self.observable():
            for block in CheckpointSource(self.skeleton).blocks():
                for sizes in ask.ways:
                    error = removal_error(block, sizes, feed, self.texts.calibration.tokens(), job.clock, job.ranks)
                    found.errors[sizes] = found.errors.get(sizes, 0.0) + error
                with job.clock("forward"):
                    for going in probes.going:
                        going.advance(block)
                curves = self._watch(block, feed, few, ask, probes)
                if ask.consumers is not None:
                    inputs.append(feed.hidden.copy())
                seen: list[Tensor] = []
                with job.clock("forward"):
                    feed.advance(block, _into(seen))
                    if probes.going:
                        few.advance(block)
                cosines, logs, tokens = job.ranks.totals(*torch.stack(seen).sum(0).tolist())
                found.influence.append(1 - cosines / tokens)
                found.curves.append({kind: curve.scaled(2.0 ** (-logs / tokens)) for kind, curve in curves.items()})
                if evaluated is not None:
                    with job.clock("evaluate"):
                        evaluated.advance(block)
            if ask.consumers is not None:
                found.slopes = self._slopes(feed, inputs, ask.consumers)
        if evaluated is not None and self.texts.evaluation is not None:
            found.dense = self.perplexity(evaluated, self.texts.evaluation)
        if probes.going:
            self._weigh(found, probes, few)
        return found

    def _watch(self, block: Block, feed: Activations, few: Activations, ask: Ask, probes: _Probes) -> dict[str, Curve]:
        """What removing ever more parts of the block would lose in its outputs, by kind; starts the probes that will tell what
        that means for the loss."""
        curves = {}
        for kind, parts in ask.watched(block).items():
            stages = [[group.consumer] for group, _, _ in parts]
            with self.job.clock("forward"):
                observed = feed.collect(block, stages, self._observe)
            for seen in observed:
                seen.add_up(self.job.ranks)
            blend_experts(stages, observed)
            with self.job.clock("solve"):
                known = [coupled(group, seen, {}, {}) for (group, _, _), seen in zip(parts, observed, strict=True)]
                curves[kind] = mean([measure(one, keep) for one, (_, keep, _) in zip(known, parts, strict=True)])
                found = [
                    choose(group, seen, one, stay, "second_order", refit=True)
                    for one, seen, (group, _, stay) in zip(known, observed, parts, strict=True)
                ]
            gone = parts[0][0].count - parts[0][2]
            with self.job.clock("forward"), without(block, [group for group, _, _ in parts], found):
                probes.start(kind, gone, few).advance(block)
        if ask.drops:
            probes.start(_DROP, 0, few)
        return curves

    def _observe(self, stage: Stage, device: torch.device) -> Observed:
        return observe(stage, device, self.texts.calibration.tokens(), self.job.clock, corrected=False)

    def _weigh(self, found: Scouted, probes: _Probes, dense: Activations) -> None:
        """Turn `found.curves` into nats, by how far the probes are from the dense model."""
        skeleton, ranks, nats = self.skeleton, self.job.ranks, dict[str, list[float]]()
        share, blocks = probes.windows.share(ranks.rank, ranks.size), list(skeleton.blocks.values())
        with skeleton.outside(), self.job.clock("evaluate"):
            lost = streamed_divergences(skeleton.model, blocks, dense, probes.going, share, skeleton.device, ranks)
        for kind, own in zip(probes.kinds, lost, strict=True):
            nats.setdefault(kind, []).append(own)
        found.drops = nats.pop(_DROP, [])
        for kind, lost in nats.items():
            weighed = in_nats([curves[kind] for curves in found.curves], probes.gone[kind], lost)
            for curves, curve in zip(found.curves, weighed, strict=True):
                curves[kind] = curve

    def _slopes(self, feed: Activations, inputs: list[Hidden], consumers: Callable[[Block], list[Site]]) -> dict[str, Tensor]:
        """By site name; `feed` holds the last block's outputs."""
        skeleton, ranks = self.skeleton, self.job.ranks
        share = self.texts.calibration.share(ranks.rank, ranks.size)
        with skeleton.outside(), self.job.clock("forward"):
            gradients = loss_gradients(skeleton.model, list(skeleton.blocks.values()), feed, share, skeleton.device)
        count = len(skeleton.blocks)
        last_first = CheckpointSource(skeleton, range(count)[::-1]).blocks()
        numbered = (replace(block, index=count - 1 - block.index) for block in last_first)
        with self.job.clock("forward"):
            return slopes(numbered, feed, inputs, gradients, consumers, ranks)

    def loss(self, layers: Sequence[int]) -> float:
        """Calibration perplexity of the dense model with these layers alone, on some of the windows."""
        few = self._first(_TRIED)
        feed = self.record(few, layers)
        with self.observable(), self.job.clock("forward"):
            for block in CheckpointSource(self.skeleton, layers).blocks():
                feed.advance(block)
        return self.perplexity(feed, few).value

    def _first(self, tokens: int) -> Windows:
        """The first calibration windows that have so many tokens, at least one a process."""
        windows = self.texts.calibration
        some = max(tokens // windows.ids.shape[1], self.job.ranks.size, 1)
        return Windows(windows.ids[:some], windows.text, None if windows.mask is None else windows.mask[:some])

    def probed(self, probes: int) -> int:
        """Tokens that are followed to the end of the model, where `probes` things are removed from each block, and without."""
        return (1 + probes * len(self.skeleton.blocks)) * self._first(_PROBED).ids.numel()

    def observable(self) -> AbstractContextManager[None]:
        """The model's experts, made so that their inputs can be counted."""
        return observable(self.skeleton.model, all_tokens=self.job.config.all_experts)

    def record(self, windows: Windows, layers: Sequence[int] | None = None) -> Activations:
        """This process's share of the windows, as the first block (of `layers`) is given them."""
        ranks, skeleton = self.job.ranks, self.skeleton
        with skeleton.outside(), self.job.clock("capture"):
            return Activations.record(
                skeleton.model,
                list(skeleton.blocks.values()),
                windows.share(ranks.rank, ranks.size),
                batch=self.job.batch(windows.ids.shape[1], skeleton.device),
                device=skeleton.device,
                folder=self.scratch,
                layers=layers,
            )

    def perplexity(self, last: Activations, windows: Windows) -> Perplexity:
        """Of the model whose last block's outputs for `windows` are in `last`."""
        ranks, skeleton = self.job.ranks, self.skeleton
        share = windows.share(ranks.rank, ranks.size)
        with skeleton.outside(), self.job.clock("evaluate"):
            return streamed_perplexity(skeleton.model, list(skeleton.blocks.values()), last, share, skeleton.device, ranks)


def _into(seen: list[Tensor]) -> Callable[[Tensor, Tensor], None]:
    return lambda before, after: seen.append(_compared(before, after))


def _compared(before: Tensor, after: Tensor) -> Tensor:
    """Sums over tokens: the cosine of the two hidden states, and log2 of the first one's square (its mean is of a typical
    token; a few tokens have most of the mean square); and how many tokens there are."""
    before, after = before.float(), after.float()
    logs = before.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny).log2()
    cosines = functional.cosine_similarity(before, after, dim=-1)
    return torch.stack([cosines.sum(), logs.sum(), logs.new_tensor(len(before))]).double().cpu()
