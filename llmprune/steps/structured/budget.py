"""One budget of parameters, spread over heads, neurons and layers where each costs the hidden states least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmprune.base.errors import InputError
from llmprune.base.notation import Allowance
from llmprune.base.words import count
from llmprune.cost.footprint import footprint
from llmprune.job.options import PruneConfig
from llmprune.models.heads import Heads
from llmprune.models.sites import Block, Site
from llmprune.steps.structured.allocate import Layer, Part, Shape, shapes_that_save
from llmprune.steps.structured.groups import Sizes, heads, neurons
from llmprune.steps.structured.scouting import Scouted
from llmprune.steps.structured.sizing import Builder, Watched, multiple, widths

_FEWEST = 8  # one in so many neurons stays at least
_TRIED = 16  # so many shapes are built, the best first, before the budget is given up


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of part that can be removed.

    Attributes:
        count: how many a layer has.
        first, step, most: how many of them go at first, then at a time, and at most.
        loads: how many may go where all layers lose as many.
        prices: parameters of one, by layer.
    """

    count: int
    first: int
    step: int
    most: int
    loads: Sequence[int]
    prices: Sequence[int]


class Budget:
    """As many parameters as the user says, by the loss that was measured as each layer lost some or went: a `Sizing`.

    Heads go in one way in all layers: whole groups with their keys and values (`groups`), or as many of each group (`heads`).

    Raises:
        InputError: fewer must stay than that, or nothing has to go.
    """

    drops = True

    def __init__(self, builder: Builder, config: PruneConfig, note: Callable[[str], None]) -> None:
        self._builder, self._config, self._note = builder, config, note
        self._whole = footprint(builder.skeleton.model, builder.blocks)["parameters"]
        self._most = Allowance.parse(config.target_params or "").of(self._whole)
        self._layers = [sum(parameter.numel() for parameter in block.module.parameters()) for block in builder.blocks]
        self.trial = (list(range(len(self._layers))), [Sizes(None, None, None, False)] * len(self._layers))
        self.ways: Sequence[Sizes] = ()
        self._layout: Heads | None = None
        self._kinds = self._removable()
        self.probes = len(self._kinds) + 1
        neuron = [kind for kind in self._kinds if kind == "neurons"]
        self._together = [[kind, *neuron] for kind in self._kinds if kind != "neurons"] or [neuron]
        least = self._whole - sum(self._layers) + min(map(self._floor, range(len(self._layers))))
        if self._most < least:
            raise InputError(
                f"target_params {config.target_params} is {self._most:,} of {self._whole:,} parameters, but one layer at its "
                f"smallest and all that is outside the layers are {least:,}: ask for more"
            )

    def __str__(self) -> str:
        return f"keep at most {self._most:,} of {self._whole:,} parameters"

    def _floor(self, layer: int) -> int:
        """Parameters of a layer at its smallest."""
        gone = [sum(self._kinds[kind].most * self._kinds[kind].prices[layer] for kind in kinds) for kinds in self._together]
        return self._layers[layer] - max(gone)

    def _removable(self) -> dict[str, _Kind]:
        """What can go, by kind; what cannot is told.

        Raises:
            InputError: neither heads nor neurons can.
        """
        found = {}
        for name, kind in {"heads": self._heads, "groups": self._groups, "neurons": self._neurons}.items():
            try:
                found[name] = kind()
            except InputError as problem:
                self._note(f"{name} are left alone: {problem}")
        if not found:
            raise InputError("a budget cannot be spread over this model, as only layers can be removed from it: use --layers")
        return found

    def _neurons(self) -> _Kind:
        count = widths(self._builder.blocks)
        step = multiple(self._config, count)
        first, most = count % step or step, count - max(count // _FEWEST, 1)
        if first > most:
            raise InputError(f"there are only {count}, in multiples of {step}")
        prices = self._prices(Sizes(count - first, None, None, False), first)
        return _Kind(count, first, step, most, [0, *range(first, most + 1, step)], prices)

    def _heads(self) -> _Kind:
        layout = self._layout = Heads.of(self._builder.skeleton.model.config)
        return self._attention(layout, layout.query, layout.value, whole=False)

    def _groups(self) -> _Kind:
        layout = self._layout = Heads.of(self._builder.skeleton.model.config)
        return self._attention(layout, layout.value, 1, whole=True)

    def _attention(self, layout: Heads, parts: int, step: int, *, whole: bool) -> _Kind:
        loads, problem = [0], InputError(f"{layout}, can lose none")
        for gone in range(step, parts, step):
            try:
                self._builder.config(self.trial[0], [self._kept(layout, parts, gone, whole)] * len(self._layers))
            except InputError as error:
                problem = error
                continue
            loads.append(gone)
        if len(loads) == 1:
            raise problem
        prices = self._prices(self._kept(layout, parts, loads[1], whole), loads[1])
        return _Kind(parts, step, step, parts - step, loads, prices)

    def _kept(self, layout: Heads, parts: int, gone: int, whole: bool) -> Sizes:
        return Sizes(None, layout.query - gone * layout.query // parts, layout, whole)

    def _prices(self, sizes: Sizes, gone: int) -> list[int]:
        """Parameters of one part, by layer, where each layer loses `gone`.

        Raises:
            InputError: transformers do not load that.
        """
        target = self._builder.target(self.trial[0], [sizes] * len(self._layers))
        built = [sum(parameter.numel() for parameter in block.parameters()) for block in target.blocks.values()]
        return [(before - after) // gone for before, after in zip(self._layers, built, strict=True)]

    def watched(self, block: Block) -> Watched:
        found: Watched = {}
        for name, kind in self._kinds.items():
            if name == "neurons":
                groups = neurons(block)
            elif self._layout:
                groups = [heads(block, self._layout, whole=name == "groups")]
            found[name] = [(group, kind.count - kind.most, kind.count - self._probed(kind)) for group in groups]
        return found

    def _probed(self, kind: _Kind) -> int:
        """How many parts of one layer go where the loss is measured: nearest to the share that is to be saved in all."""
        share = kind.count * (self._whole - self._most) / sum(self._layers)
        return min(range(kind.first, kind.most + 1, kind.step), key=lambda gone: abs(gone - share))

    def consumers(self, block: Block) -> list[Site]:
        named = {group.consumer.name: group.consumer for parts in self.watched(block).values() for group, *_ in parts}
        return list(named.values())

    def decide(self, scouted: Scouted, leaving: Iterator[int]) -> tuple[list[int], list[Sizes]]:
        save = self._whole - self._most
        layers = [
            Layer(
                self._layers[number],
                scouted.drops[number],
                {name: Part(curves[name], kind.first, kind.step, kind.prices[number]) for name, kind in self._kinds.items()},
            )
            for number, curves in enumerate(scouted.curves)
        ]
        most = min(len(layers) - 1, -(-save // min(self._layers)))
        order = sorted(range(len(layers)), key=lambda number: scouted.drops[number])[:most]
        allowed = None if self._config.per_layer else {name: kind.loads for name, kind in self._kinds.items()}
        shapes = [shape for kinds in self._together for shape in shapes_that_save(layers, order, save, kinds, allowed)]
        problem = InputError(f"{self} is not possible in steps that load: ask for another number")
        for shape in sorted(shapes, key=lambda shape: shape.loss)[:_TRIED]:
            stay = [number for number in range(len(layers)) if number not in shape.dropped]
            sizes = self._sizes(shape)
            try:
                target = self._builder.target(stay, sizes)
            except InputError as error:
                problem = error
                continue
            left = footprint(target.model, target.describe())["parameters"]
            self._note(f"{self._told(stay, sizes)}: {left:,} of {self._whole:,} parameters ({left / self._whole:.1%})")
            return stay, sizes
        raise problem

    def _sizes(self, shape: Shape) -> list[Sizes]:
        """What stays of each layer; None for a kind of which no layer loses any."""
        less = {kind for one in shape.gone for kind, count in one.items() if count}
        found = []
        for gone in shape.gone:
            left = {kind: self._kinds[kind].count - count for kind, count in gone.items() if kind in less}
            whole = "groups" in gone
            kept = left.get("groups" if whole else "heads")
            if kept is not None and whole and self._layout:
                kept *= self._layout.query // self._layout.value
            found.append(Sizes(left.get("neurons"), kept, self._layout, whole))
        return found

    def _told(self, layers: list[int], sizes: list[Sizes]) -> str:
        parts = [f"{len(layers)} of {count(len(self._layers), 'layer')}"]
        if self._layout and sizes[0].heads:
            parts.append(f"{_range([own.heads for own in sizes])} of {count(self._layout.query, 'head')}")
        if sizes[0].neurons:
            parts.append(f"{_range([own.neurons for own in sizes])} of {count(self._kinds['neurons'].count, 'neuron')}")
        return "within the budget stay " + ", ".join(parts)


def _range(counts: Sequence[int | None]) -> str:
    """Such as `6`, or `4 to 8` where layers differ."""
    known = sorted({count for count in counts if count is not None})
    return f"{known[0]} to {known[-1]}" if len(known) > 1 else str(known[0])
