"""How much of each kind of group stays in a block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune.models.groups import Group, heads, neurons
from llmprune.models.heads import Heads
from llmprune.models.sites import Block


@dataclass(frozen=True, slots=True)
class Sizes:
    """What stays in each block; None: all.

    Attributes:
        heads: how many query heads of `layout` stay; `whole`: groups of them go, with their keys and values.
    """

    neurons: int | None
    heads: int | None
    layout: Heads | None
    whole: bool

    def any(self) -> bool:
        """Whether heads or neurons are removed."""
        return self.neurons is not None or self.heads is not None

    def left(self) -> Heads | None:
        """The layout of heads that stays."""
        if self.layout is None or self.heads is None:
            return None
        value = self.heads * self.layout.value // self.layout.query if self.whole else self.layout.value
        return replace(self.layout, query=self.heads, value=value)

    def steps(self, block: Block) -> list[list[Group]]:
        """What to remove from together, heads first: what they lose, the neurons see."""
        steps: list[list[Group]] = []
        if self.layout is not None and self.heads is not None:
            steps.append([heads(block, self.layout, whole=self.whole)])
        if self.neurons is not None:
            steps.append(neurons(block))
        return steps

    def stay(self, group: Group) -> int:
        """How many parts of `group` stay."""
        if group.kind == "neurons" or self.layout is None:
            return self.neurons or group.count
        return (self.heads or group.count) * group.count // self.layout.query
