"""What is kept of the inputs of a stage's matrices, and the corrected target that follows from it.

The statistics of an expert that saw few tokens are blended with the pooled ones of all experts of its layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from llmprune.base.clock import Clock
from llmprune.base.errors import InputError
from llmprune.base.processes import Ranks
from llmprune.models.sites import Block, Site, Stage
from llmprune.numerics.stats import CrossGram, Gram, InputSample, Statistic, blend_with_pool
from llmprune.stream.activations import Activations

CORRECTION = 0.5  # how far the corrected target goes from the dense weights


@dataclass(frozen=True, slots=True)
class Observed:
    """What is kept of a stage's inputs: the solver's statistic, a sample to measure errors on, and the dense inputs'
    product with them where the target is corrected."""

    statistic: Statistic
    sample: InputSample
    cross: CrossGram | None
    clock: Clock

    def add(self, x: Tensor, dense: Tensor | None) -> None:
        with self.clock("statistics"):
            self.statistic.add(x)
            self.sample.add(x)
            if self.cross is not None:
                if dense is None or dense.shape != x.shape:
                    raise InputError("the dense and the pruned model send it different tokens; use --target dense")
                self.cross.add(x, dense)

    def add_up(self, ranks: Ranks) -> None:
        """Count what the other processes counted. The sample stays this one's."""
        for tensor in self.statistic.sums():
            ranks.add_up(tensor)
        counts = ranks.totals(self.statistic.tokens, self.sample.tokens)
        self.statistic.tokens, self.sample.tokens = (int(count) for count in counts)
        if self.cross is not None:
            ranks.add_up(self.cross.sum)
            self.cross.tokens = self.statistic.tokens

    def target(self, w: Tensor) -> Tensor:
        """The weights to imitate on the pruned model's inputs."""
        if self.cross is None:
            return w
        assert isinstance(self.statistic, Gram)
        return self.cross.corrected_target(w, self.statistic, CORRECTION)


def traced(feed: Activations, block: Block, ranks: Ranks) -> tuple[list[list[Site]], list[str]]:
    """The block's sites by stage, as all processes agree, and those that its forward never runs."""
    sites = {site.name: site for site in block.sites}
    names = ranks.agree([[site.name for site in stage] for stage in feed.stages(block)])
    stages = [[sites[name] for name in stage] for stage in names]
    called = {site.name for stage in stages for site in stage}
    return stages, [site.name for site in block.sites if site.name not in called]


def add_up(group: Sequence[Stage], observed: Sequence[Observed], ranks: Ranks) -> None:
    """Count what all processes saw of a group's inputs, and blend what experts saw.

    Raises:
        InputError: inputs are not finite; their sites are named.
    """
    for stage, seen in zip(group, observed, strict=True):
        with seen.clock("statistics"):
            seen.add_up(ranks)
        if not seen.statistic.finite():
            names = ", ".join(site.name for site in stage)
            raise InputError(f"the inputs of {names} hold NaN or infinity; try --dtype float32")
    blend_experts(group, observed)


def blend_experts(group: Sequence[Stage], observed: Sequence[Observed]) -> None:
    """Blend the statistics of each expert with the pooled ones, which weigh as much as one token an input: with fewer, an
    expert's own Gram has no full rank."""
    pools: dict[str, list[Statistic]] = {}
    for stage, seen in zip(group, observed, strict=True):
        if stage[0].pool:
            pools.setdefault(stage[0].pool, []).append(seen.statistic)
    columns = {stage[0].pool: stage[0].columns for stage in group}
    for pool, statistics in pools.items():
        blend_with_pool(statistics, columns[pool])


def passes(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages that are collected together: experts that are fed from the same hidden states share a pass."""
    groups: dict[str, list[Stage]] = {}
    for stage in stages:
        groups.setdefault(stage[0].pool or stage[0].name, []).append(stage)
    return list(groups.values())
