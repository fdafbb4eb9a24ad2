"""The step that removes structure: scout the dense model, decide what goes, and stream what stays into the smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.cost.base import Sized
from llmprune.cost.footprint import footprint
from llmprune.data.windows import Texts
from llmprune.job.job import Job
from llmprune.job.record import Perplexity, Removal, RunRecord
from llmprune.models.experts import observable
from llmprune.models.extras import copy_extras
from llmprune.models.heads import Heads
from llmprune.models.sites import Block
from llmprune.models.skeleton import Skeleton, load_config
from llmprune.models.target import Target
from llmprune.output.resume import Manifest
from llmprune.output.shards import ShardWriter
from llmprune.steps.base import Feeds, Keeper, Load, Resume, Step
from llmprune.steps.structured.budget import Budget
from llmprune.steps.structured.removal import SmallerBlocks
from llmprune.steps.structured.scores import SCORES
from llmprune.steps.structured.scouting import Ask, Scout, Scouted
from llmprune.steps.structured.sizes import Sizes
from llmprune.steps.structured.sizing import Amounts, Builder
from llmprune.steps.weights.step import choose
from llmprune.stream.engine import stream
from llmprune.stream.source import CheckpointSource


@dataclass(frozen=True, slots=True)
class Decision:
    """What stays, and what the dense model has shown.

    Attributes:
        layers: by number; `sizes` of each.
        dense: the dense model's perplexity, where a text to evaluate on is named.
        influence: of each layer of the dense model.
        speed: what was asked and predicted, where a speed was.
        slopes: what a score with `backward` needs, by site name.
    """

    layers: list[int]
    sizes: list[Sizes]
    dense: Perplexity | None
    influence: list[float]
    speed: dict[str, Any] | None
    slopes: Mapping[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """As plain data, without `slopes`."""
        dense = asdict(self.dense) if self.dense else None
        return {
            "layers": self.layers,
            "sizes": [asdict(own) for own in self.sizes],
            "perplexity": dense,
            "influence": self.influence,
            "speed": self.speed,
        }

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Decision:
        """What `as_dict` made."""
        sizes = [Sizes(**{**own, "layout": Heads(**own["layout"]) if own["layout"] else None}) for own in saved["sizes"]]
        dense = Perplexity(**saved["perplexity"]) if saved["perplexity"] else None
        return cls(saved["layers"], sizes, dense, saved["influence"], saved["speed"], {})


class RemoveStructure(Step):
    """A `Step`: remove heads, neurons and layers, as the job asks; fit what reads them again.

    Attributes:
        removals: what was removed, in order.
    """

    title = "structure"

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        self._job, self._skeleton, self._scratch = job, skeleton, scratch
        self.removals: list[Removal] = []
        if skeleton.model.config.get_text_config().is_heterogeneous:
            raise InputError(f"{skeleton.checkpoint.folder} has layers of different sizes already: start from its source")
        self._builder = Builder(skeleton)
        self._sizing = (Budget if job.config.budgets else Amounts)(self._builder, job)
        trial = self._builder.target(*self._sizing.trial)  # of the size that is asked for, other layers aside, but of a budget
        if job.config.sparse:  # whose step comes after this one
            choose(job, trial.describe())

    def __str__(self) -> str:
        return str(self._sizing)

    def load(self, texts: Texts) -> Load:
        return Load(probed=self._dense(texts).probed(self._sizing.probes) if self._sizing.probes else 0)

    def run(self, texts: Texts, record: RunRecord, into: Path, manifest: Manifest | None) -> None:
        job = self._job
        known = job.ranks.agree(manifest.known if manifest else {})
        recall = known and not self._backward()  # else the slopes are needed again
        decision = Decision.read(known) if recall else self._decide(texts, self.scout(texts))
        target = self._builder.target(decision.layers, decision.sizes)
        writer = ShardWriter(target, into, set(target.names))
        if manifest:
            manifest.known = decision.as_dict()
        record.dense = decision.dense
        record.pruned = self._stream(texts, decision, target, Resume.of(job, manifest, writer))
        record.removals = self.removals
        record.structure = structure(decision, target, self._skeleton)
        record.peak_memory = job.clock.peaks()
        if manifest:
            with job.clock("write"):
                writer.finish()
                self._write_extras(target, into)
            if decision.speed and isinstance(self._sizing, Budget):
                source = self._skeleton.checkpoint.folder
                record.structure["speed"] = self._sizing.finish(decision.speed, source, into)

    def _backward(self) -> bool:
        """Whether the score needs a backward pass."""
        return getattr(SCORES.get(self._job.config.score), "backward", False)

    def _dense(self, texts: Texts) -> Scout:
        return Scout(self._job, self._skeleton, texts, self._scratch)

    def _write_extras(self, target: Target, into: Path) -> None:
        """All that goes with the weights; the configuration is the smaller model's."""
        source = self._skeleton.checkpoint.folder
        copy_extras(source, into)
        target.config.dtype, target.config.architectures = load_config(source).dtype, [type(target.model).__name__]
        target.config.save_pretrained(into)

    def scout(self, texts: Texts) -> Scouted:
        """Run the dense model."""
        consumers = self._sizing.consumers if self._backward() else None
        return self._dense(texts).look(Ask(self._sizing.ways, self._sizing.watched, self._sizing.drops, consumers))

    def _decide(self, texts: Texts, scouted: Scouted) -> Decision:
        """What stays."""
        chosen = self._job.ranks.agree(self._sizing.decide(scouted, self._leaving(texts, scouted)))
        return Decision(chosen.layers, chosen.sizes, scouted.dense, scouted.influence, chosen.speed, scouted.slopes)

    def _leaving(self, texts: Texts, scouted: Scouted) -> Iterator[int]:
        """Layers by block influence, or by what the loss becomes without them and those before; the least first."""
        layers = list(range(len(scouted.influence)))
        while layers:
            if self._job.config.layer_score == "influence":
                layer = min(layers, key=lambda layer: scouted.influence[layer])
            else:
                layer = min(layers, key=lambda layer: self._dense(texts).loss([other for other in layers if other != layer]))
            layers.remove(layer)
            yield layer

    def _stream(self, texts: Texts, decision: Decision, target: Target, resume: Resume) -> Perplexity | None:
        """Write the smaller model's blocks; returns its perplexity, where a text to evaluate on is named."""
        job, scout = self._job, self._dense(texts)
        feed = scout.record(texts.calibration, decision.layers)
        evaluated = scout.record(texts.evaluation, decision.layers) if texts.evaluation else None
        refit = job.config.refit is not False
        blocks = SmallerBlocks(
            CheckpointSource(self._skeleton, decision.layers),
            target,
            decision.sizes,
            job.config.score,
            refit,
            feed,
            feed.fork() if refit and job.recipe.target == "corrected" and decision.sizes[0].any() else None,
            texts.calibration.tokens(),
            job.clock,
            job.ranks,
            job.progress.removed,
            self.removals,
            decision.slopes,
            resume.finished,
            resume.writer.restore,
        )

        def visit(block: Block) -> None:
            if resume.has(block):
                job.progress.repeated(0)

        job.progress.start(len(decision.layers), 0)
        with scout.observable(), observable(target.model, all_tokens=job.config.all_experts):
            feeds = Feeds(feed, evaluated, len(decision.layers), job.progress, job.clock)
            stream(blocks, feeds, Keeper(job.clock, blocks.report, resume), visit)
        if evaluated is None or texts.evaluation is None:
            return None
        return scout.perplexity(evaluated, texts.evaluation)


def structure(decision: Decision, target: Target, source: Skeleton) -> dict[str, Any]:
    """For the record: what was removed, and what that made smaller."""
    gone = sorted(set(range(len(source.blocks))) - set(decision.layers))
    return {
        "removed_layers": gone,
        "block_influence": decision.influence,
        "whole_groups_of_heads": decision.sizes[0].whole if decision.sizes[0].heads else None,
        "per_layer": [{"heads": own.heads, "neurons": own.neurons} for own in decision.sizes],
        "architecture": type(target.model).__name__,
        "before": footprint(Sized.of(source)),
        "after": footprint(Sized.of(target)),
        "differ_by_layer": target.config.get_text_config().is_heterogeneous,
    }
