"""The hidden states of a set of token windows as they move through the model, block by block.

They rest on the host, in memory or in a mapped file, and visit the compute device one batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.base.hardware import return_free_memory
from llmprune.data.windows import Windows
from llmprune.models.sites import Block, Site, Stage
from llmprune.stream.capture import Call, Recorder
from llmprune.stream.held import Held
from llmprune.stream.mapped import MappedTensors
from llmprune.stream.tape import HIDDEN, Tape, Values, given
from llmprune.stream.tapes import Batch, Tapes
from llmprune.stream.transfer import Ahead, to_host
from llmprune.stream.watching import Look, StageReached, gain, hooked, same_memory

KEPT = 2  # of what batches have come to in the middle of a block, at most so many times their hidden states are kept


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

    def __init__(
        self,
        hidden: Hidden,
        calls: list[list[Call]],
        real: list[Tensor | None],
        device: torch.device,
        folder: Path | None = None,
        tapes: Tapes | None = None,
    ) -> None:
        self.hidden, self._calls, self._real, self._device, self._folder = hidden, calls, real, device, folder
        self._ahead, self._tapes, self._held = Ahead(device), tapes or Tapes(device), Held(folder)
        self._module: nn.Module | None = None  # of the block that batches are in the middle of

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
        hidden: Hidden = [] if folder is None else MappedTensors(folder)
        recorder, calls, real = Recorder(), [], []
        for inputs in windows.batches(batch, device):
            first, called = recorder.record(model, blocks, **inputs)
            hidden.append(to_host(first))
            calls.append(called if layers is None else [called[layer] for layer in layers])
            real.append(None if (mask := inputs.get("attention_mask")) is None else mask.bool().flatten())
        return cls(hidden, calls, real, device, folder)

    def fork(self) -> Activations:
        """The same hidden states, to go another way from here."""
        return Activations(self.hidden.copy(), self._calls, self._real, self._device, self._folder, self._tapes)

    def advance(self, block: Block, see: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Replace the hidden states by the block's outputs for them; `see(before, after)` is shown those of real tokens.

        What `collect` has kept of the same block is gone on from.

        Raises:
            InputError: an output is not finite.
        """
        for index in self._in_order():
            before = self.real_tokens(self.hidden[index], index).clone() if see is not None else None
            self._advance(block, index)
            if see is not None and before is not None:
                see(before, self.real_tokens(self.hidden[index], index))
        self.forget()

    def forget(self) -> None:
        """Let go of what `collect` has kept: the block has changed before where that came to."""
        self._module = None
        self._held.clear()

    def _advance(self, block: Block, index: int) -> None:
        tape = self._tape(block, index) if self._module is block.module else None
        if tape is None:
            return self._put_out(block, index, self.call(block, index, block.module))
        values = self._values(block, index, tape, position := self._held.position(index, tape))
        tape.run(block.module, values, position, len(tape))
        self._put_out(block, index, values[tape.output])

    def _put_out(self, block: Block, index: int, out: Tensor) -> None:
        if not bool(torch.isfinite(out).all()):
            raise InputError(f"{block.name} puts out NaN or infinity on calibration batch {index}; try --dtype float32")
        self.hidden[index] = to_host(out)
        self._held.drop(index)

    def stages(self, block: Block) -> list[Stage]:
        """The block's sites in the order they run, those that read the same input together (q, k and v; gate and up).

        A site that the block's forward never calls is in no stage.
        """
        seen: list[tuple[Tensor, list[Site]]] = []

        def see(site: Site, x: Tensor, tokens: Tensor | None) -> None:
            if any(site is known for _, sites in seen for known in sites):
                return  # it runs twice; its first input decides the order
            if seen and same_memory(seen[-1][0], x):
                seen[-1][1].append(site)
            else:
                seen.append((x, [site]))

        with hooked(block.sites, see):
            self.call(block, 0, block.module)
        return [sites for _, sites in seen]

    def gains(self, block: Block, sites: Sequence[Site]) -> dict[str, Tensor]:
        """By site name, the gain (in,) of the norm whose output the site reads as it is; nothing for other sites."""
        norms: list[tuple[Tensor, nn.Module]] = []
        found: dict[str, Tensor] = {}

        def see(site: Site, x: Tensor, tokens: Tensor | None) -> None:
            for out, norm in reversed(norms):
                if same_memory(out, x):
                    found[site.name] = gain(norm, x)
                    return

        own = [module for module in block.module.modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 1]
        handles = [norm.register_forward_hook(lambda norm, _, out: norms.append((out, norm))) for norm in own]
        try:
            with hooked(sites, see):
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

        `make(stage, device)` builds one. A batch's forward ends as soon as the last stage has been reached, and goes on the
        next time from before the first, if that is for a later stage of the same block: in between, no weights may change but
        those that come after. `paired` gives the accumulators dense inputs.
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
                raise StageReached

        if self._module is not block.module:
            self.forget()
            self._module = block.module
        sites = {site.name: site for site in block.sites if site.name in names}
        tape = self._tape(block, index)
        with hooked([*sites.values()], look), suppress(StageReached):
            out = self._in_pieces(tape, block, index, sites, look) if tape else self.call(block, index, block.module)
            if advance:
                self._put_out(block, index, out)

    def _in_pieces(self, tape: Tape, block: Block, index: int, sites: Mapping[str, Site], look: Look) -> Tensor:
        """What the block puts out for one batch, from where that has come to; keeps what is needed to go on from before the
        first of `sites`. Shows what reaches those that `tape` knows; a module that it runs as it is shows its own.
        """
        uses = [use for use in tape.uses if use.site in sites]
        known = self._held.position(index, tape)
        position = known if known <= uses[0].position else 0
        values = self._values(block, index, tape, position)
        here, nbytes = tape.rest(uses[0].position)
        if here > position and nbytes <= KEPT * self.hidden[index].nbytes:
            tape.run(block.module, values, position, here)
            self._held.put(index, tape, here, values)
            position = here
        for use in uses:
            tape.run(block.module, values, position, use.position)
            position = use.position
            if use.value is not None:
                look(sites[use.site], values[use.value], None)
        tape.run(block.module, values, position, len(tape))
        return values[tape.output]

    def _tape(self, block: Block, index: int) -> Tape | None:
        def batch(number: int) -> Batch:
            return self._calls[number][block.index], self.hidden[number]

        return self._tapes.find(block, batch(index), map(batch, reversed(range(len(self.hidden)))))

    def _values(self, block: Block, index: int, tape: Tape, position: int) -> Values:
        """All that `tape` needs from `position` on, which is where the batch has come to, or the beginning."""
        values = given(self._calls[index][block.index])
        if position:
            values |= self._held.take(index, self._device)
        if tape.needs_hidden(position):
            values[HIDDEN] = self._ahead.take(self.hidden, index)
        return values

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
        with torch.enable_grad(), hooked(sites, lambda site, x, tokens: seen.append((site.name, x))):
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
        """The batches' numbers; the batch after each is sent to the device ahead, and what all have freed is given back."""
        for index in range(len(self.hidden)):
            self._ahead.start(self.hidden, index + 1)
            yield index
        return_free_memory()


@dataclass(frozen=True, slots=True)
class PairedDense:
    """The dense model's stream of the same tokens and its copy of the block; `advance`: move the stream on as well."""

    stream: Activations
    block: Block
    advance: bool
