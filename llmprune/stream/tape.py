"""The operations of a block's forward, recorded once, so that other batches can go through it in pieces.

Between two pieces weights may change that come after; what was computed before them need not be computed again. No family is
known here: an operation is what torch dispatches. A module may be one operation, which runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from llmprune.stream.capture import Call

HIDDEN = "hidden"  # the name of the block's hidden states
Values: TypeAlias = dict[str, Tensor]
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class Ref:
    """Where an operation takes a tensor from: the values computed so far or, by its path, the block's own."""

    name: str
    own: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """`run` is an operator, or the path of a module; `outputs` names its tensors, None for what is no tensor; `writes` names
    those that it changes."""

    run: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str | None, ...]
    writes: tuple[str, ...]
    heavy: bool


@dataclass(frozen=True, slots=True)
class Use:
    """A site is about to be used, after `position` operations, on the value `value`; None: within a module run as it is."""

    site: str
    position: int
    value: str | None


@dataclass(frozen=True, slots=True)
class Made:
    """Of a recorded tensor: bytes, whether it is contiguous, and which memory it lies in."""

    nbytes: int
    contiguous: bool
    memory: int


class Tape:
    """What a block computes for inputs of one signature.

    Attributes:
        uses: of sites, in order.
        output: the name of the block's outputs.
    """

    def __init__(self, operations: Sequence[Operation], uses: Sequence[Use], made: Mapping[str, Made], output: str) -> None:
        self.uses, self.output = uses, output
        self._operations, self._made = operations, made
        self._writes = [(number, name) for number, operation in enumerate(operations) for name in operation.writes]
        self._born: dict[str, int] = {}
        self._last: dict[str, int] = {output: len(operations)}
        for number, operation in enumerate(operations):
            for leaf in tree_leaves((operation.args, operation.kwargs)):
                if isinstance(leaf, Ref) and not leaf.own:
                    self._last[leaf.name] = max(number, self._last.get(leaf.name, 0))
            for name in filter(None, operation.outputs):
                self._born.setdefault(name, number)

    def __len__(self) -> int:
        return len(self._operations)

    def kind(self) -> tuple[Any, ...]:
        """Equal for tapes that do the same."""
        return tuple((str(operation.run), operation.outputs) for operation in self._operations)

    def live(self, position: int) -> list[str]:
        """Values, apart from the block's inputs, that were computed before `position` and are needed from there on."""
        return [name for name, born in self._born.items() if born < position <= self._last.get(name, -1)]

    def needs_hidden(self, position: int) -> bool:
        """Whether the block's hidden states are needed from `position` on."""
        return position <= self._last.get(HIDDEN, -1)

    def rest(self, position: int) -> tuple[int, int]:
        """Where to wait before `position`, and the bytes to keep there: the fewest since the last heavy operation."""
        first = max((n + 1 for n in range(position) if self._operations[n].heavy), default=0)
        found = [(self._kept(here), -here) for here in range(first, position + 1)]
        least, here = min((one for one in found if one[0] is not None), default=(None, 0))
        return (-here, least) if least is not None else (0, 0)

    def _kept(self, position: int) -> int | None:
        """Bytes of the live values; None where they cannot be put away and fetched again as they are: they share memory, or
        will be written into."""
        live = {name: self._made[name] for name in self.live(position)}
        memory = {one.memory: self._last[name] for name, one in live.items()}
        if not all(one.contiguous for one in live.values()) or len(memory) < len(live):
            return None
        for number, name in self._writes:
            if position <= number <= memory.get(self._made[name].memory, -1):
                return None
        return sum(one.nbytes for one in live.values())

    def run(self, module: nn.Module, values: Values, start: int, stop: int) -> None:
        """Do the operations from `start` to before `stop`; `values` gets their results, and loses what is not needed later."""

        def fetch(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            return _own(module, leaf.name) if leaf.own else values[leaf.name]

        for number in range(start, stop):
            operation = self._operations[number]
            args, kwargs = filled(operation.args, fetch), filled(operation.kwargs, fetch)
            run = module.get_submodule(operation.run) if isinstance(operation.run, str) else operation.run
            for name, value in zip(operation.outputs, results(run(*args, **kwargs)), strict=True):
                if name is not None:
                    values[name] = value
            del args, kwargs
            for name in [name for name in values if self._last.get(name, -1) <= number]:
                del values[name]


def given(call: Call) -> Values:
    """The tensors that a block is called with besides its hidden states, by the names that tapes give them."""
    return {f"input {n}": leaf for n, leaf in enumerate(tree_leaves((call.args, call.kwargs))) if isinstance(leaf, Tensor)}


def signature(call: Call, hidden: Tensor) -> tuple[Any, ...] | None:
    """What a tape depends on besides the block; None where that cannot be told."""
    leaves = tree_leaves((call.args, call.kwargs))
    if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in [hidden, *leaves])


def _own(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def results(out: Any) -> Sequence[Any]:
    """What an operation returns, as a list."""
    return out if isinstance(out, (tuple, list)) else (out,)


def filled(template: Any, fetch: Callable[[Any], Any]) -> Any:
    """Arguments with what `fetch` has for each leaf."""
    if isinstance(template, (tuple, list)):
        return type(template)(filled(one, fetch) for one in template)
    if isinstance(template, dict):
        return {key: filled(one, fetch) for key, one in template.items()}
    return fetch(template)
