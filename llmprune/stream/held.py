"""What batches have come to in the middle of a block: the few tensors from which their forward goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmprune.stream.mapped import MappedTensors
from llmprune.stream.tape import Tape, Values
from llmprune.stream.transfer import to_host


@dataclass(frozen=True, slots=True)
class _Place:
    """How far a batch has come on a tape, and where its tensors are."""

    tape: Tape
    position: int
    shelf: list[Tensor] | MappedTensors
    slots: range


class Held:
    """By batch, what its tape needs from where it has come to. It rests on the host: in memory or, if a folder is named, in one
    file on its disk, whose places are used again where they fit.
    """

    def __init__(self, folder: Path | None) -> None:
        self._places: dict[int, _Place] = {}
        self._folder = folder
        self._file: MappedTensors | None = None
        self._slots: dict[int, tuple[range, list[tuple[torch.Size, torch.dtype]]]] = {}  # in the file

    def put(self, index: int, tape: Tape, position: int, values: Values) -> None:
        tensors = [to_host(values[name]) for name in tape.live(position)]
        if self._folder is None:
            self._places[index] = _Place(tape, position, tensors, range(len(tensors)))
        else:
            self._file = MappedTensors(self._folder) if self._file is None else self._file
            self._places[index] = _Place(tape, position, self._file, self._write(index, tensors, self._file))

    def _write(self, index: int, tensors: list[Tensor], file: MappedTensors) -> range:
        kinds = [(tensor.shape, tensor.dtype) for tensor in tensors]
        slots, known = self._slots.get(index, (range(0), []))
        if kinds != known:
            slots = range(len(file), len(file) + len(tensors))
            file.extend(tensors)
            self._slots[index] = slots, kinds
        else:
            for slot, tensor in zip(slots, tensors, strict=True):
                file[slot] = tensor
        return slots

    def position(self, index: int, tape: Tape) -> int:
        """How far the batch has come on `tape`."""
        place = self._places.get(index)
        return place.position if place is not None and place.tape is tape else 0

    def take(self, index: int, device: torch.device) -> Values:
        """What a batch needs to go on from there."""
        place = self._places[index]
        names = place.tape.live(place.position)
        return {name: place.shelf[slot].to(device) for name, slot in zip(names, place.slots, strict=True)}

    def drop(self, index: int) -> None:
        """Let go of what a batch has come to, if anything is kept."""
        self._places.pop(index, None)

    def clear(self) -> None:
        """Let go of all, but for the room in the file."""
        self._places.clear()
