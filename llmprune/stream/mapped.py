"""Tensors in a file that has no name: each is mapped while someone holds it, and the file goes with the process."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.base.errors import InputError, MachineError

_PIECE = 2**30  # bytes of a write: macOS takes no more than 2 GiB


class MappedTensors(MutableSequence[Tensor]):
    """A list of tensors on the disk of `folder`. What is set must have the shape and dtype of what it replaces.

    A tensor that is taken out takes memory, and a file descriptor, until it is freed; what is changed in it is changed in
    the list.

    Raises:
        MachineError: the disk is full.
    """

    def __init__(self, folder: Path, tensors: Iterable[Tensor] = ()) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []  # where in the file each begins, and what it is
        self._end = 0
        self.extend(tensors)

    def copy(self) -> MappedTensors:
        return MappedTensors(self._folder, self)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        start, shape, dtype = self._places[index]
        held = mmap.mmap(self._file.fileno(), shape.numel() * dtype.itemsize, offset=start)
        return torch.frombuffer(held, dtype=dtype).view(shape)

    def __setitem__(self, index: Any, value: Any) -> None:
        start, shape, dtype = self._places[index]
        if (shape, dtype) != (value.shape, value.dtype):
            raise InputError(
                f"a block turns {dtype} {list(shape)} into {value.dtype} {list(value.shape)}: pass --activations memory"
            )
        self._write(value, start)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("tensors stay where they are")

    def insert(self, index: int, value: Tensor) -> None:
        """At the end only."""
        if index != len(self):
            raise TypeError("tensors stay where they are")
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY  # a map begins at such a place
        self._write(value, start)
        self._places.append((start, value.shape, value.dtype))
        self._end = start + value.nbytes

    def _write(self, value: Tensor, start: int) -> None:
        """Not through a map: there a full disk would be a bus error."""
        left = value.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left[:_PIECE], start)
                left, start = left[done:], start + done
        except OSError as error:
            raise MachineError(f"no room for the activations in {self._folder}: {error.strerror}") from None
