"""What can be removed from every layer of a model: heads, groups of heads, neurons; and how many of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmprune.base.errors import InputError
from llmprune.base.words import count
from llmprune.job.options import PruneConfig
from llmprune.models.groups import Group, heads, neurons
from llmprune.models.heads import Heads
from llmprune.models.sites import Block
from llmprune.steps.structured.sizes import Sizes
from llmprune.steps.structured.sizing import Builder, multiple, widths

_FEWEST = 8  # one in so many neurons stays at least


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of part that can be removed.

    Attributes:
        count: how many a layer has.
        first, step, most: how many of them go at first, then at a time, and at most.
        loads: how many may go where all layers lose as many.
        smaller: the blocks with `loads[1]` of them gone, without weights.
    """

    count: int
    first: int
    step: int
    most: int
    loads: Sequence[int]
    smaller: Sequence[Block]

    def counts(self) -> list[int]:
        """How many may go where each layer has its own number."""
        return [0, *range(self.first, self.most + 1, self.step)]


class Kinds:
    """By name. Heads go in one way in all layers: whole groups with their keys and values (`groups`), or as many of each group
    (`heads`).

    Attributes:
        found: what can go; what cannot is told.
        together: names that can go together.

    Raises:
        InputError: neither heads nor neurons can.
    """

    def __init__(self, builder: Builder, config: PruneConfig, note: Callable[[str], None]) -> None:
        self._builder, self._config = builder, config
        self._every = list(range(len(builder.blocks)))
        self.layout: Heads | None = None
        self.found: dict[str, Kind] = {}
        for name, kind in {"heads": self._heads, "groups": self._groups, "neurons": self._neurons}.items():
            try:
                self.found[name] = kind()
            except InputError as problem:
                note(f"{name} are left alone: {problem}")
        if not self.found:
            raise InputError("a budget cannot be spread over this model, as only layers can be removed from it: use --layers")
        neuron = [name for name in self.found if name == "neurons"]
        self.together = [[name, *neuron] for name in self.found if name != "neurons"] or [neuron]

    def _neurons(self) -> Kind:
        whole = widths(self._builder.blocks)
        step = multiple(self._config, whole)
        first, most = whole % step or step, whole - max(whole // _FEWEST, 1)
        if first > most:
            raise InputError(f"there are only {whole}, in multiples of {step}")
        smaller = self._smaller(Sizes(whole - first, None, None, False))
        return Kind(whole, first, step, most, [0, *range(first, most + 1, step)], smaller)

    def _heads(self) -> Kind:
        layout = self.layout = Heads.of(self._builder.skeleton.model.config)
        return self._attention(layout, layout.query, layout.value, whole=False)

    def _groups(self) -> Kind:
        layout = self.layout = Heads.of(self._builder.skeleton.model.config)
        return self._attention(layout, layout.value, 1, whole=True)

    def _attention(self, layout: Heads, parts: int, step: int, *, whole: bool) -> Kind:
        loads, problem = [0], InputError(f"{layout}, can lose none")
        for gone in range(step, parts, step):
            try:
                self._builder.config(self._every, [_kept(layout, parts, gone, whole)] * len(self._every))
            except InputError as error:
                problem = error
                continue
            loads.append(gone)
        if len(loads) == 1:
            raise problem
        smaller = self._smaller(_kept(layout, parts, loads[1], whole))
        return Kind(parts, step, step, parts - step, loads, smaller)

    def _smaller(self, sizes: Sizes) -> list[Block]:
        """Raises: InputError: transformers do not load that."""
        return self._builder.target(self._every, [sizes] * len(self._every)).describe()

    def groups(self, name: str, block: Block) -> list[Group]:
        """What parts of the kind are in a block."""
        if name == "neurons":
            return neurons(block)
        assert self.layout is not None
        return [heads(block, self.layout, whole=name == "groups")]

    def sizes(self, gone: Sequence[Mapping[str, int]]) -> list[Sizes]:
        """What stays where so many of each kind go, by layer; None for a kind of which no layer loses any."""
        less = {name for one in gone for name, number in one.items() if number}
        found = []
        for one in gone:
            left = {name: self.found[name].count - number for name, number in one.items() if name in less}
            whole = "groups" in one
            kept = left.get("groups" if whole else "heads")
            if kept is not None and whole and self.layout:
                kept *= self.layout.query // self.layout.value
            found.append(Sizes(left.get("neurons"), kept, self.layout, whole))
        return found

    def told(self, layers: Sequence[int], sizes: Sequence[Sizes]) -> str:
        """What stays, in words."""
        parts = [f"{len(layers)} of {count(len(self._every), 'layer')}"]
        if self.layout and sizes[0].heads:
            parts.append(f"{_range([own.heads for own in sizes])} of {count(self.layout.query, 'head')}")
        if sizes[0].neurons:
            parts.append(f"{_range([own.neurons for own in sizes])} of {count(self.found['neurons'].count, 'neuron')}")
        return "within the budget stay " + ", ".join(parts)


def _kept(layout: Heads, parts: int, gone: int, whole: bool) -> Sizes:
    return Sizes(None, layout.query - gone * layout.query // parts, layout, whole)


def _range(counts: Sequence[int | None]) -> str:
    """Such as `6`, or `4 to 8` where layers differ."""
    known = sorted({count for count in counts if count is not None})
    return f"{known[0]} to {known[-1]}" if len(known) > 1 else str(known[0])
