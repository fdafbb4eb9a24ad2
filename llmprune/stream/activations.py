"""The hidden states of a set of token windows as they move through the model, block by block.

They rest on the host, in memory or in a mapped file, and visit the compute device one batch at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.data.windows import Windows
from llmprune.models.sites import Block, Site, Stage
from llmprune.stream.capture import Call, Recorder
from llmprune.stream.mapped import MappedTensors
from llmprune.stream.transfer import Ahead, to_host


class Accumulator(Protocol):
    """Something that counts inputs `x` (tokens, in), beside those of the dense model where there are such."""

    def add(self, x: Tensor, dense: Tensor | None) -> None: ...


Hidden: TypeAlias = list[Tensor] | MappedTensors
A = TypeVar("A", bound=Accumulator)


class Activations:
    """A `Feed`: hidden states, the blocks' recorded calls, and which positions are real tokens.

    Attributes:
        hidden: one (batch, tokens, width) tensor a batch, the inputs of the next block.
    """

    def __init__(self, hidden: Hidden, calls: list[list[Call]], real: list[Tensor | None], device: torch.device) -> None:
        self.hidden, self._calls, self._real, self._device = hidden, calls, real, device
        self._ahead = Ahead(device)

    @classmethod
    def record(
        cls,
        model: PreTrainedModel,
        blocks: Sequence[nn.Module],
        windows: Windows,
        *,
        batch: int,
        device: torch.device,
        folder: Path | None = None,
        layers: Sequence[int] | None = None,
    ) -> Activations:
        """Run the model's embeddings on `windows`, `batch` at a time, up to its first block. The hidden states rest in memory
        or, if a folder is named, on its disk. Only the blocks numbered in `layers` will be run, if any are.
        """
        recorder = Recorder()
        hidden: Hidden = [] if folder is None else MappedTensors(folder)
        calls, real = [], []
        for inputs in windows.batches(batch, device):
            first, called = recorder.record(model, blocks, **inputs)
            mask = inputs.get("attention_mask")
            hidden.append(to_host(first))
            calls.append(called if layers is None else [called[layer] for layer in layers])
            real.append(None if mask is None else mask.bool().flatten())
        return cls(hidden, calls, real, device)

    def fork(self) -> Activations:
        """The same hidden states, to go another way from here."""
        return Activations(self.hidden.copy(), self._calls, self._real, self._device)

    def advance(self, block: Block, see: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Replace the hidden states by the block's outputs for them; `see(before, after)` is shown those of real tokens.

        Raises:
            InputError: an output is not finite.
        """
        for index in self._in_order():
            before = self.real_tokens(self.hidden[index], index).clone() if see is not None else None
            self._advance(block, index)
            if see is not None and before is not None:
                see(before, self.real_tokens(self.hidden[index], index))

    def _advance(self, block: Block, index: int) -> None:
        out = self.call(block, index, block.module)
        if not bool(torch.isfinite(out).all()):
            raise InputError(f"{block.name} puts out NaN or infinity on calibration batch {index}; try --dtype float32")
        self.hidden[index] = to_host(out)

    def stages(self, block: Block) -> list[Stage]:
        """The block's sites in the order they run, those that read the same input together (q, k and v; gate and up).

        A site that the block's forward never calls is in no stage.
        """
        seen: list[tuple[Tensor, list[Site]]] = []

        def see(site: Site, x: Tensor, tokens: Tensor | None) -> None:
            if any(site is known for _, sites in seen for known in sites):
                return  # it runs twice; its first input decides the order
            if seen and _same_memory(seen[-1][0], x):
                seen[-1][1].append(site)
            else:
                seen.append((x, [site]))

        with _hooked(block.sites, see):
            self.call(block, 0, block.module)
        return [sites for _, sites in seen]

    def gains(self, block: Block, sites: Sequence[Site]) -> dict[str, Tensor]:
        """By site name, the gain (in,) of the norm whose output the site reads as it is; nothing for other sites."""
        norms: list[tuple[Tensor, nn.Module]] = []
        found: dict[str, Tensor] = {}

        def see(site: Site, x: Tensor, tokens: Tensor | None) -> None:
            for out, norm in reversed(norms):
                if _same_memory(out, x):
                    found[site.name] = _gain(norm, x)
                    return

        own = [module for module in block.module.modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 1]
        handles = [norm.register_forward_hook(lambda norm, _, out: norms.append((out, norm))) for norm in own]
        try:
            with _hooked(sites, see):
                self.call(block, 0, block.module)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def collect(
        self,
        block: Block,
        stages: Sequence[Stage],
        make: Callable[[Stage, torch.device], A],
        paired: PairedDense | None = None,
    ) -> list[A]:
        """One accumulator a stage, fed with all real tokens that reach the stage's input.

        `make(stage, device)` builds one. A batch's forward ends as soon as the last stage has been reached. `paired`
        gives the accumulators dense inputs.
        """
        found = [make(stage, self._device) for stage in stages]
        names = [stage[0].name for stage in stages]
        along = paired.stream._in_order() if paired is not None else iter(())
        for index in self._in_order():
            dense: dict[str, Tensor] = {}
            if paired is not None:
                next(along)
                paired.stream._watch(paired.block, index, names, dense.__setitem__, advance=paired.advance)

            def count(name: str, x: Tensor, dense: dict[str, Tensor] = dense) -> None:
                found[names.index(name)].add(x, dense.get(name))

            self._watch(block, index, names, count)
        return found

    def _watch(
        self, block: Block, index: int, names: Sequence[str], see: Callable[[str, Tensor], None], *, advance: bool = False
    ) -> None:
        """Run one batch and show the real tokens (tokens, in) that reach each of the sites called `names`, in order."""

        def look(site: Site, x: Tensor, tokens: Tensor | None) -> None:
            see(site.name, self.real_tokens(x, index, tokens))
            if site.name == names[-1] and not advance:
                raise _StageReached

        with _hooked([site for site in block.sites if site.name in names], look), suppress(_StageReached):
            if advance:
                self._advance(block, index)
            else:
                self.call(block, index, block.module)

    def real_tokens(self, x: Tensor, index: int, tokens: Tensor | None = None) -> Tensor:
        """The rows of `x` (..., width) of batch `index` that are no padding, (tokens, width).

        `tokens` says which of the batch's positions the rows are, where they are not all of them.
        """
        x = x.reshape(-1, x.shape[-1])
        real = self._real[index]
        if real is None:
            return x
        real = real.to(x.device)
        return x[real if tokens is None else real[tokens]]

    def at(self, hidden: Hidden) -> Activations:
        """The same windows with other hidden states: the inputs of any block."""
        return Activations(hidden, self._calls, self._real, self._device)

    def backward(self, block: Block, index: int, gradient: Tensor, sites: Sequence[Site], sums: Mapping[str, Tensor]) -> Tensor:
        """From the gradient of a loss in the block's outputs for batch `index` to that in its inputs.

        Adds to `sums`, by site name, the sum over tokens of each input of the site times the gradient in it, (in,).
        """
        hidden = self.hidden[index].to(self._device).detach().requires_grad_()
        seen: list[tuple[str, Tensor]] = []
        with torch.enable_grad(), _hooked(sites, lambda site, x, tokens: seen.append((site.name, x))):
            out = self._calls[index][block.index].run(block.module, hidden)
            into, *others = torch.autograd.grad(
                out, [hidden, *(x for _, x in seen)], gradient.to(self._device), allow_unused=True
            )
        for (name, x), slope in zip(seen, others, strict=True):
            if slope is not None:  # an expert that no token chose
                sums[name] += (x.detach().float() * slope.float()).reshape(-1, x.shape[-1]).sum(0)
        return into.to(self.hidden[index].device)

    def call(self, block: Block, index: int, forward: Callable[..., Any]) -> Tensor:
        """What `forward` puts out where the model would call the block on batch `index`."""
        return self._calls[index][block.index].run(forward, self._ahead.take(self.hidden, index))

    def _in_order(self) -> Iterator[int]:
        """The batches' numbers; the batch after each is sent to the device ahead."""
        for index in range(len(self.hidden)):
            self._ahead.start(self.hidden, index + 1)
            yield index


@dataclass(frozen=True, slots=True)
class PairedDense:
    """The dense model's stream of the same tokens and its copy of the block; `advance`: move the stream on as well."""

    stream: Activations
    block: Block
    advance: bool


class _StageReached(Exception):
    """Leaves a block's forward once all that was asked for has been counted."""


@contextmanager
def _hooked(sites: Sequence[Site], see: Callable[[Site, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Call `see(site, input, tokens)` before each of the sites is used; see `Site.watch`."""
    handles = [site.watch(functools.partial(see, site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gain(norm: nn.Module, like: Tensor) -> Tensor:
    """What a norm multiplies by: half of what it makes of alternating ones, less what it makes of their opposite."""
    ones = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    ones[1::2] = -1
    return ((norm(ones[None]) - norm(-ones[None]))[0] / 2 * ones).float()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
