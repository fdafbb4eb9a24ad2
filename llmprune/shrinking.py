"""A run that makes a model smaller: scout the dense model, decide what goes, and stream what stays into the smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.budget import Budget
from llmprune.errors import InputError
from llmprune.evaluate.perplexity import Perplexity
from llmprune.models.experts import observable
from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton
from llmprune.report.record import Removal
from llmprune.run import Job
from llmprune.scouting import Ask, Scout, Scouted
from llmprune.sizing import Amounts, Builder, footprint
from llmprune.stream.activations import Activations
from llmprune.stream.engine import Sink, stream
from llmprune.stream.source import CheckpointSource
from llmprune.structured import scores
from llmprune.structured.shrink import Shrinker, Sizes
from llmprune.structured.target import Target
from llmprune.texts import Texts


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
        trial: an empty model of the size that is asked for, other layers aside; the whole model where a budget decides.

    Raises:
        InputError: what is asked for cannot be removed.
    """

    def __init__(self, job: Job, skeleton: Skeleton, texts: Texts, scratch: Path | None) -> None:
        self.job, self.skeleton, self.texts = job, skeleton, texts
        self.removals: list[Removal] = []
        if skeleton.model.config.get_text_config().is_heterogeneous:
            raise InputError(f"{skeleton.checkpoint.folder} has layers of different sizes already: start from its source")
        self._dense, self._builder = Scout(job, skeleton, texts, scratch), Builder(skeleton)
        kind = Amounts if job.config.target_params is None else Budget
        self._sizing = kind(self._builder, job.config, job.progress.note)
        self.trial = self._builder.target(*self._sizing.trial)

    def __str__(self) -> str:
        return str(self._sizing)

    def probed(self) -> int:
        """Calibration tokens that scouting follows through the model besides the windows."""
        return self._dense.probed(self._sizing.probes) if self._sizing.probes else 0

    def scout(self) -> Scouted:
        """Run the dense model."""
        backward = getattr(scores.load(self.job.config.score), "backward", False)
        return self._dense.look(
            Ask(self._sizing.ways, self._sizing.watched, self._sizing.drops, self._sizing.consumers if backward else None)
        )

    def decide(self, scouted: Scouted) -> Decision:
        """What stays."""
        layers, sizes = self.job.ranks.agree(self._sizing.decide(scouted, self._leaving(scouted)))
        return Decision(layers, sizes, self._builder.target(layers, sizes), scouted.slopes)

    def _leaving(self, scouted: Scouted) -> Iterator[int]:
        """Layers by block influence, or by what the loss becomes without them and those before; the least first."""
        layers = list(range(len(scouted.influence)))
        while layers:
            if self.job.config.layer_score == "influence":
                layer = min(layers, key=lambda layer: scouted.influence[layer])
            else:
                layer = min(layers, key=lambda layer: self._dense.loss([other for other in layers if other != layer]))
            layers.remove(layer)
            yield layer

    def stream(self, decision: Decision, sink: Sink) -> Perplexity | None:
        """Put the smaller model's blocks into `sink`; returns its perplexity, where a text to evaluate on is named."""
        job = self.job
        feed = self._dense.record(self.texts.calibration, decision.layers)
        evaluated = self._dense.record(self.texts.evaluation, decision.layers) if self.texts.evaluation else None
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
        with self._dense.observable(), observable(decision.target.model, all_tokens=job.config.all_experts):
            stream(shrinker, _Feeds(job, feed, evaluated), _Timed(job, sink), lambda block: None)
        if evaluated is None or self.texts.evaluation is None:
            return None
        return self._dense.perplexity(evaluated, self.texts.evaluation)


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
