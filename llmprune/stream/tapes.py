"""Tapes of the block that is under way, one for each signature of inputs, each kind proven before it is used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.models.sites import Block
from llmprune.stream.capture import Call
from llmprune.stream.tape import HIDDEN, Tape, Values, given, signature
from llmprune.stream.taping import record

Batch = tuple[Call, Tensor]  # how a block is called, and its hidden states


class Tapes:
    """Shared by all streams of a model: a block and its dense copy do the same. Hidden states may rest elsewhere than on the
    `device` that blocks run on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block = -1
        self._found: dict[Any, Tape | None] = {}
        self._proven: dict[Any, bool] = {}

    def find(self, block: Block, batch: Batch, others: Iterable[Batch]) -> Tape | None:
        """The tape for `batch`; None where the block cannot be run in pieces.

        Args:
            others: batches; the first of the same signature proves that a tape holds for others than it was recorded on.
        """
        if self._block != block.index:
            self._block, self._found = block.index, {}
        key = signature(*batch)
        if key is not None and key not in self._found:
            tape = record(block, *self._there(batch))
            if tape is not None and (kind := (key, tape.kind())) not in self._proven:
                alike = next((other for other in others if signature(*other) == key), batch)
                self._proven[kind] = _proves(tape, block.module, self._there(alike))
            self._found[key] = tape if tape is not None and self._proven[kind] else None
        return self._found.get(key)

    def _there(self, batch: Batch) -> Batch:
        call, hidden = batch
        return call, hidden.to(self._device)


def _proves(tape: Tape, module: nn.Module, batch: Batch) -> bool:
    """Whether going through the block in pieces, between which only what is live is kept, gives what the block gives."""
    call, hidden = batch
    begin: Values = given(call) | {HIDDEN: hidden}
    values, position = dict(begin), 0
    for use in tape.uses:
        here, _ = tape.rest(use.position)
        if here > position:
            tape.run(module, values, position, here)
            live = {name: values[name].clone() for name in tape.live(here)}
            values, position = begin | live, here
    tape.run(module, values, position, len(tape))
    return torch.equal(values[tape.output], call.run(module, hidden))
