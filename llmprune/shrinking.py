"""A run that makes a model smaller: scout the dense model, decide what goes, and stream what stays into the smaller one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.config import PruneConfig
from llmprune.data import Windows
from llmprune.errors import InputError
from llmprune.evaluate.perplexity import Perplexity, streamed_perplexity
from llmprune.models.experts import observable
from llmprune.models.sites import Block, Site
from llmprune.models.skeleton import Skeleton
from llmprune.preflight import active
from llmprune.report.record import Removal
from llmprune.run import Job
from llmprune.solving import lean
from llmprune.stream.activations import Activations, Hidden
from llmprune.stream.engine import Sink, stream
from llmprune.stream.source import CheckpointSource
from llmprune.structured import scores
from llmprune.structured.allocate import Curve, allocate, mean, measure
from llmprune.structured.groups import Heads, neurons
from llmprune.structured.plan import Amount, kept_layers, kept_neurons, smaller_config, uneven_config, ways_to_keep_heads
from llmprune.structured.shrink import Shrinker, Sizes, check_fit, coupled, observe, removal_error
from llmprune.structured.slopes import loss_gradients, slopes
from llmprune.structured.target import Target
from llmprune.texts import Texts

_TRIED = 16  # calibration windows that layers are tried on
_WIDE, _ROUND, _ROUND_TINY = 1024, 64, 8  # neurons from which multiples of 64 stay; else of 8


@dataclass(slots=True)
class Scouted:
    """What the dense model shows.

    Attributes:
        dense: its perplexity, where a text to evaluate on is named.
        influence: of each block, 1 - mean cosine of a token's hidden state before and after it (Men et al., "ShortGPT", 2024).
        losses: by way of removing heads, the sum over blocks of the relative error that would leave.
        slopes: how the loss depends on what the consumers read, by site name, for a score that asks for it.
        curves: of each block, what removing ever more heads or neurons would lose, where sizes are to differ by layer.
    """

    dense: Perplexity | None = None
    influence: list[float] = field(default_factory=list)
    losses: dict[bool, float] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, list[Curve]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """What stays: the layers, by number, the sizes of each, the model to fill; and what the score needs."""

    layers: list[int]
    sizes: list[Sizes]
    target: Target
    slopes: Mapping[str, Tensor]


class Shrinking:
    """Makes the model of `skeleton` smaller, as `job` asks.

    Args:
        scratch: a folder whose disk is to hold the hidden states; None: memory holds them.

    Attributes:
        removals: what was removed, in order.
        trial: an empty model of the size that is asked for; which layers stay may differ.

    Raises:
        InputError: what is asked for cannot be removed.
    """

    def __init__(self, job: Job, skeleton: Skeleton, texts: Texts, scratch: Path | None) -> None:
        self.job, self.skeleton, self.texts, self.scratch = job, skeleton, texts, scratch
        self.removals: list[Removal] = []
        if skeleton.model.config.get_text_config().is_heterogeneous:
            raise InputError(f"{skeleton.checkpoint.folder} has layers of different sizes already: start from its source")
        config, blocks = job.config, skeleton.describe()
        self._layout = Heads.of(self.skeleton.model.config) if config.heads is not None else None
        count = len(blocks)
        self._layers = kept_layers(Amount.parse("layers", config.layers), count) if config.layers is not None else count
        self._width = _widths(blocks, config) if config.neurons is not None else None
        self._ways = self._loadable(Amount.parse("heads", config.heads)) if config.heads is not None else {}
        if config.per_layer:  # one way for all layers: the first, with keys and values
            self._ways = dict(list(self._ways.items())[:1])
        whole = next(iter(self._ways), False)
        self.trial = self._target(list(range(self._layers)), [self._sizes(self._ways, whole=whole)] * self._layers)

    def __str__(self) -> str:
        """In words, such as `6 of 8 heads, 528 of 704 neurons`."""
        parts = []
        if self._layout:
            parts.append(f"{next(iter(self._ways.values()))} of {self._layout.query} heads")
        if self._width:
            parts.append(f"{self._width[1]} of {self._width[0]} neurons")
        if self._layers < len(self.skeleton.blocks):
            parts.append(f"{self._layers} of {len(self.skeleton.blocks)} layers")
        return "keep " + ", ".join(parts)

    def _loadable(self, amount: Amount) -> dict[bool, int]:
        """How many heads stay, by way of removing them: the number nearest to what is asked for that transformers load."""
        assert self._layout is not None
        ways, problem = ways_to_keep_heads(amount, self._layout), InputError("")
        for kept in dict.fromkeys(kept for kept, _ in ways):
            found = {whole: kept for own, whole in ways if own == kept}
            try:
                for whole in found:
                    self._target(list(range(self._layers)), [self._sizes(found, whole=whole)] * self._layers)
            except InputError as error:
                problem = problem if str(problem) else error
                continue
            if str(problem):
                self.job.progress.note(f"{ways[0][0]} heads would not load ({problem}); {kept} stay")
            return found
        raise problem

    def _sizes(self, ways: dict[bool, int], *, whole: bool) -> Sizes:
        return Sizes(self._width[1] if self._width else None, ways.get(whole), self._layout, whole)

    def _target(self, layers: list[int], sizes: Sequence[Sizes]) -> Target:
        """The model of these layers and sizes, empty.

        Raises:
            InputError: transformers do not load it.
        """
        config, uneven = self.skeleton.model.config, len(set(sizes)) > 1
        smaller = smaller_config(
            config,
            neurons=None if uneven or not sizes[0].neurons or not self._width else (self._width[0], sizes[0].neurons),
            heads=None if uneven else sizes[0].left(),
            layers=layers if len(layers) < len(self.skeleton.blocks) else None,
        )
        if uneven:
            smaller = uneven_config(smaller, [(own.neurons, own.left()) for own in sizes], self._width[0] if self._width else 0)
        target = Target(self.skeleton, smaller, layers)
        described = self.skeleton.describe()
        for layer, built, own in zip(layers, target.describe(), sizes, strict=True):
            check_fit(described[layer], built, own)
        return target

    def scout(self) -> Scouted:
        """Run the dense model."""
        found = Scouted()
        feed = self._record(self.texts.calibration)
        evaluated = self._record(self.texts.evaluation) if self.texts.evaluation else None
        tokens = self.texts.calibration.tokens()
        backward, inputs = getattr(scores.load(self.job.config.score), "backward", False), list[Hidden]()
        with self._observable():
            for block in CheckpointSource(self.skeleton).blocks():
                if len(self._ways) > 1 and self._layout:
                    for whole, kept in self._ways.items():
                        sizes = Sizes(None, kept, self._layout, whole)
                        error = removal_error(block, sizes, feed, tokens, self.job.clock, self.job.ranks)
                        found.losses[whole] = found.losses.get(whole, 0.0) + error
                if self.job.config.per_layer:
                    for kind, curve in self._curves(block, feed).items():
                        found.curves.setdefault(kind, []).append(curve)
                if backward:
                    inputs.append(feed.hidden.copy())
                similar: list[tuple[float, int]] = []
                with self.job.clock("forward"):
                    feed.advance(block, _into(similar))
                total, seen = self.job.ranks.totals(*(sum(column) for column in zip(*similar, strict=True)))
                found.influence.append(1 - total / seen)
                if evaluated is not None:
                    with self.job.clock("evaluate"):
                        evaluated.advance(block)
            if backward:
                found.slopes = self._slopes(feed, inputs)
        if evaluated is not None and self.texts.evaluation is not None:
            found.dense = self._perplexity(evaluated, self.texts.evaluation)
        return found

    def _slopes(self, feed: Activations, inputs: list[Hidden]) -> dict[str, Tensor]:
        """What the gradient score needs, by site name; `feed` holds the last block's outputs."""
        skeleton, ranks = self.skeleton, self.job.ranks
        share = self.texts.calibration.share(ranks.rank, ranks.size)
        with skeleton.outside(), self.job.clock("forward"):
            gradients = loss_gradients(skeleton.model, list(skeleton.blocks.values()), feed, share, skeleton.device)
        count = len(skeleton.blocks)
        last_first = CheckpointSource(skeleton, range(count)[::-1]).blocks()
        numbered = (replace(block, index=count - 1 - block.index) for block in last_first)
        sizes = self._sizes(self._ways, whole=False) if False in self._ways else self._sizes(self._ways, whole=True)

        def consumers(block: Block) -> list[Site]:
            return [group.consumer for step in sizes.steps(block) for group in step]

        with self.job.clock("forward"):
            return slopes(numbered, feed, inputs, gradients, consumers, ranks)

    def decide(self, scouted: Scouted) -> Decision:
        """What stays. Layers go by block influence or by what the loss becomes without them, the least first; heads in the way
        that loses less.
        """
        layers = list(range(len(scouted.influence)))
        while len(layers) > self._layers:
            if self.job.config.layer_score == "influence":
                layers.remove(min(layers, key=lambda layer: scouted.influence[layer]))
            else:
                without = {layer: [other for other in layers if other != layer] for layer in layers}
                layers = without[min(layers, key=lambda layer: self._loss(without[layer]))]
        sizes = [self._sizes(self._ways, whole=self._way(scouted))] * len(layers)
        if self.job.config.per_layer:
            curves = {kind: [every[layer] for layer in layers] for kind, every in scouted.curves.items()}
            sizes = self._spread(sizes[0], curves)
        layers, sizes = self.job.ranks.agree((layers, sizes))
        return Decision(layers, sizes, self._target(layers, sizes), scouted.slopes)

    def _way(self, scouted: Scouted) -> bool:
        return min(self._ways, key=lambda way: scouted.losses.get(way, 0.0), default=False)

    def _curves(self, block: Block, feed: Activations) -> dict[str, Curve]:
        """What removing ever more of the block's heads and neurons would lose, up to three times what is asked for."""
        found: dict[str, Curve] = {}
        sizes = self._sizes(self._ways, whole=next(iter(self._ways), False))
        tokens, clock = self.texts.calibration.tokens(), self.job.clock
        squares = (float(feed.real_tokens(hidden, index).float().square().sum()) for index, hidden in enumerate(feed.hidden))
        power = self.job.ranks.totals(sum(squares))[0] / tokens
        for groups in sizes.steps(block):
            with clock("forward"):
                observed = feed.collect(
                    block,
                    [[group.consumer] for group in groups],
                    lambda stage, device: observe(stage, device, tokens, clock, corrected=False),
                )
            for seen in observed:
                seen.add_up(self.job.ranks)
            lean([[group.consumer] for group in groups], observed)
            curves = []
            for group, seen in zip(groups, observed, strict=True):
                fewest = max(3 * sizes.stay(group) - 2 * group.count, group.bundles)
                with clock("solve"):
                    curves.append(measure(coupled(group, seen, {}, {}), fewest, power))
            found[groups[0].kind] = mean(curves)
        return found

    def _spread(self, each: Sizes, curves: dict[str, list[Curve]]) -> list[Sizes]:
        """As many heads and neurons in all as if each layer had the sizes `each`, by what every layer would lose."""
        count = len(next(iter(curves.values())))
        sizes = [each] * count
        if self._width and "neurons" in curves:
            whole, step = self._width[0], _multiple(self.job.config, self._width[0])
            gone = allocate(curves["neurons"], count * (whole - self._width[1]), step, whole % step or step)
            sizes = [replace(own, neurons=self._width[0] - less) for own, less in zip(sizes, gone, strict=True)]
        if self._layout and each.heads and "heads" in curves:
            parts = self._layout.value if each.whole else self._layout.query
            lose = parts - each.heads * parts // self._layout.query
            step = 1 if each.whole else self._layout.value
            gone = allocate(curves["heads"], count * lose, step, step)
            heads = self._layout.query // parts
            sizes = [replace(own, heads=heads * (parts - less)) for own, less in zip(sizes, gone, strict=True)]
        return sizes

    def _loss(self, layers: list[int]) -> float:
        """Calibration perplexity of the dense model with these layers alone, on some of the windows."""
        windows = self.texts.calibration
        some = max(_TRIED, self.job.ranks.size)
        few = Windows(windows.ids[:some], windows.text, None if windows.mask is None else windows.mask[:some])
        feed = self._record(few, layers)
        with self._observable(), self.job.clock("forward"):
            for block in CheckpointSource(self.skeleton, layers).blocks():
                feed.advance(block)
        return self._perplexity(feed, few).value

    def stream(self, decision: Decision, sink: Sink) -> Perplexity | None:
        """Put the smaller model's blocks into `sink`; returns its perplexity, where a text to evaluate on is named."""
        job = self.job
        feed = self._record(self.texts.calibration, decision.layers)
        evaluated = self._record(self.texts.evaluation, decision.layers) if self.texts.evaluation else None
        refit = job.config.refit is not False
        shrinker = Shrinker(
            CheckpointSource(self.skeleton, decision.layers),
            decision.target,
            decision.sizes,
            job.config.score,
            refit,
            feed,
            feed.fork() if refit and job.recipe.target == "corrected" and decision.sizes[0].any() else None,
            self.texts.calibration.tokens(),
            job.clock,
            job.ranks,
            job.progress.removed,
            self.removals,
            decision.slopes,
        )
        job.progress.start(len(decision.layers), 0)
        with self._observable(), observable(decision.target.model, all_tokens=job.config.all_experts):
            stream(shrinker, _Feeds(job, feed, evaluated), _Timed(job, sink), lambda block: None)
        if evaluated is None or self.texts.evaluation is None:
            return None
        return self._perplexity(evaluated, self.texts.evaluation)

    def _observable(self) -> AbstractContextManager[None]:
        return observable(self.skeleton.model, all_tokens=self.job.config.all_experts)

    def _record(self, windows: Windows, layers: Sequence[int] | None = None) -> Activations:
        ranks, skeleton = self.job.ranks, self.skeleton
        with skeleton.outside(), self.job.clock("capture"):
            return Activations.record(
                skeleton.model,
                list(skeleton.blocks.values()),
                windows.share(ranks.rank, ranks.size),
                batch=max(self.job.config.batch_size // ranks.size, 1),
                device=skeleton.device,
                folder=self.scratch,
                layers=layers,
            )

    def _perplexity(self, last: Activations, windows: Windows) -> Perplexity:
        """Of the model whose last block's outputs for `windows` are in `last`."""
        ranks, skeleton = self.job.ranks, self.skeleton
        share = windows.share(ranks.rank, ranks.size)
        with skeleton.outside(), self.job.clock("evaluate"):
            return streamed_perplexity(skeleton.model, list(skeleton.blocks.values()), last, share, skeleton.device, ranks)


@dataclass(frozen=True, slots=True)
class _Feeds:
    """Moves the calibration and evaluation streams on."""

    job: Job
    calibration: Activations
    evaluation: Activations | None

    def advance(self, block: Block) -> None:
        with self.job.clock("forward"):
            self.calibration.advance(block)
        if self.evaluation is not None:
            with self.job.clock("evaluate"):
                self.evaluation.advance(block)
        self.job.progress.block(block.index)


@dataclass(frozen=True, slots=True)
class _Timed:
    job: Job
    sink: Sink

    def put(self, block: Block) -> None:
        with self.job.clock("write"):
            self.sink.put(block)


def footprint(model: PreTrainedModel, blocks: Sequence[Block]) -> dict[str, int]:
    """Parameters, multiplications a token with matrices (of experts, with two), and bytes of keys and values a token."""
    text, tied = model.config.get_text_config(), model.all_tied_weights_keys
    found = {
        "parameters": sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name not in tied),
        "macs_a_token": int(active(blocks)) + text.vocab_size * text.hidden_size,
    }
    try:
        layouts = [Heads.of(text.per_layer_config[index]) for index in range(len(blocks))]
    except InputError:
        return found
    return found | {"kv_bytes_a_token": sum(2 * own.value * own.width * model.dtype.itemsize for own in layouts)}


def _into(similar: list[tuple[float, int]]) -> Callable[[Tensor, Tensor], None]:
    return lambda before, after: similar.append(_similarity(before, after))


def _similarity(before: Tensor, after: Tensor) -> tuple[float, int]:
    """Sum of the cosines of tokens' hidden states, and how many tokens there are."""
    return float(functional.cosine_similarity(before.float(), after.float(), dim=-1).sum()), len(before)


def _widths(blocks: Sequence[Block], config: PruneConfig) -> tuple[int, int]:
    """How many neurons each feed-forward part has, and how many stay.

    Raises:
        InputError: their numbers differ, or none or all would stay.
    """
    counts = {group.count for block in blocks for group in neurons(block)}
    if len(counts) > 1:
        raise InputError(f"feed-forward parts of {', '.join(map(str, sorted(counts)))} neurons cannot be made smaller alike")
    count = counts.pop()
    return count, kept_neurons(Amount.parse("neurons", config.neurons or ""), count, _multiple(config, count))


def _multiple(config: PruneConfig, count: int) -> int:
    """Of which the number of neurons that stay is one."""
    return config.round_to or (_ROUND if count >= _WIDE else _ROUND_TINY)


def structure(decision: Decision, scouted: Scouted, source: Skeleton) -> dict[str, Any]:
    """For the record: what was removed, and what that made smaller."""
    gone = sorted(set(range(len(source.blocks))) - set(decision.layers))
    return {
        "removed_layers": gone,
        "block_influence": scouted.influence,
        "whole_groups_of_heads": decision.sizes[0].whole if decision.sizes[0].heads else None,
        "per_layer": [{"heads": own.heads, "neurons": own.neurons} for own in decision.sizes],
        "architecture": type(decision.target.model).__name__,
        "before": footprint(source.model, source.describe()),
        "after": footprint(decision.target.model, decision.target.describe()),
        "differ_by_layer": decision.target.config.get_text_config().is_heterogeneous,
    }
