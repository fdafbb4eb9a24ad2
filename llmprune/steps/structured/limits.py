"""How much may stay of what a budget counts: parameters, bytes, multiplications."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmprune.base.errors import InputError
from llmprune.base.notation import ALLOWANCES, Allowance
from llmprune.cost import disk_bytes, macs, parameters
from llmprune.cost.base import OfBlocks, Sized
from llmprune.models.target import Target
from llmprune.steps.structured.kinds import Kinds
from llmprune.steps.structured.sizing import Builder

COUNTED: dict[str, OfBlocks] = {"target_params": parameters, "target_bytes": disk_bytes, "target_macs": macs}


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget of one resource.

    Attributes:
        most: that all of the model may take; `whole`: that it takes now, of which `layers` take theirs.
        saved: what a layer takes less with so many parts gone, by kind, layer and number.
        refused: says why less than a number cannot be reached.
    """

    most: float
    whole: float
    layers: Sequence[float]
    saved: Callable[[str, int, int], float]
    refused: Callable[[float], str]

    def inside(self) -> float:
        """What the layers may take together."""
        return self.most - (self.whole - sum(self.layers))

    def share(self) -> float:
        """What is to be saved, of what the layers take."""
        return (self.whole - self.most) / sum(self.layers)

    def check(self, kinds: Kinds) -> None:
        """Raises: InputError: one layer at its smallest, and all that is outside the layers, take more."""
        smallest = min(
            cost - sum(self.saved(name, number, kinds.found[name].most) for name in names)
            for number, cost in enumerate(self.layers)
            for names in kinds.together
        )
        least = self.whole - sum(self.layers) + smallest
        if self.most < least:
            raise InputError(self.refused(least))


class Counted:
    """A budget of what can be counted; the option's text says how much."""

    def __init__(self, builder: Builder, kinds: Kinds, option: str, text: str) -> None:
        self._cost, self._noun, config = COUNTED[option], ALLOWANCES[option].noun, builder.skeleton.model.config
        self._whole = self._cost.measure(Sized.of(builder.skeleton)) or 0
        self._most = Allowance.parse(text, option).of(self._whole)
        layers = [self._cost.of_block(config, block) for block in builder.blocks]
        prices = {
            name: [
                (before - self._cost.of_block(config, block)) / kind.loads[1]
                for before, block in zip(layers, kind.smaller, strict=True)
            ]
            for name, kind in kinds.found.items()
        }

        def refused(least: float) -> str:
            return (
                f"{option} {text} is {self._most:,} of {self._whole:,} {self._noun}, but one layer at its smallest and all "
                f"that is outside the layers are {least:,.0f}: ask for more"
            )

        self.limit = Limit(self._most, self._whole, layers, lambda kind, layer, gone: prices[kind][layer] * gone, refused)
        self.limit.check(kinds)

    def __str__(self) -> str:
        return f"at most {self._most:,} of {self._whole:,} {self._noun}"

    def left(self, target: Target) -> int:
        """What the smaller model takes."""
        return self._cost.measure(Sized.of(target)) or 0

    def told(self, target: Target) -> str:
        left = self.left(target)
        return f"{left:,} of {self._whole:,} {self._noun} ({left / self._whole:.1%})"

    def kept(self, target: Target) -> bool:
        """Whether the budget is kept."""
        return self.left(target) <= self._most
