"""Tensors in a memory-mapped file that has no name: it takes no memory but for the tensor in use, and goes with the process."""

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

_AT_ONCE = 64  # tensors that are mapped together
_PIECE = 2**30  # bytes of a write: macOS takes no more than 2 GiB
_UNUSED = getattr(mmap, "MADV_DONTNEED", None)  # not every system has it


class MappedTensors(MutableSequence[Tensor]):
    """A list of tensors on the disk of `folder`. What is set must have the shape and dtype of what it replaces.

    Raises:
        MachineError: the disk is full.
    """

    def __init__(self, folder: Path, tensors: Iterable[Tensor] = ()) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this
        self._maps: list[mmap.mmap] = []
        self._tensors: list[Tensor] = []
        self._places: list[tuple[mmap.mmap, int, int]] = []  # of each tensor: its map, where in it, how many bytes
        self._mapped = self._used = self._in_use = 0
        self.extend(tensors)

    def copy(self) -> MappedTensors:
        return MappedTensors(self._folder, self)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: Any) -> Any:
        self._let_go(self._in_use)
        self._in_use = index
        return self._tensors[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        here = self._tensors[index]
        if (here.shape, here.dtype) != (value.shape, value.dtype):
            raise InputError(
                f"a block turns {here.dtype} {list(here.shape)} into {value.dtype} {list(value.shape)}: "
                "pass --activations memory"
            )
        here.copy_(value)
        self._let_go(index)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("tensors stay where they are")

    def insert(self, index: int, value: Tensor) -> None:
        """At the end only."""
        if index != len(self):
            raise TypeError("tensors stay where they are")
        start = self._room(value.nbytes)
        offset = start - (self._mapped - len(self._maps[-1]))
        self._write(value, start)
        self._tensors.append(
            torch.frombuffer(self._maps[-1], dtype=value.dtype, count=value.numel(), offset=offset).view(value.shape)
        )
        self._places.append((self._maps[-1], offset, value.nbytes))
        self._let_go(index)

    def _write(self, value: Tensor, start: int) -> None:
        """Write it into the file, which takes its room: a full disk shows here, not as a bus error."""
        left = value.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left[:_PIECE], start)
                left, start = left[done:], start + done
        except OSError as error:
            raise self._full(error) from None

    def _full(self, error: OSError) -> MachineError:
        return MachineError(f"no room for the activations in {self._folder}: {error.strerror}")

    def _room(self, nbytes: int) -> int:
        """Where in the file the next `nbytes` go. It is mapped many at a time: each map takes a file descriptor."""
        size = -(-nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self._used + size > self._mapped:
            self._used = self._mapped
            self._mapped += _AT_ONCE * size
            try:
                os.ftruncate(self._file.fileno(), self._mapped)
            except OSError as error:
                raise self._full(error) from None
            self._maps.append(mmap.mmap(self._file.fileno(), _AT_ONCE * size, offset=self._used))
        self._used += size
        return self._used - size

    def _let_go(self, index: int) -> None:
        """Of the memory that a tensor takes; it is read again when it is touched."""
        if index < len(self) and _UNUSED is not None:
            held, offset, nbytes = self._places[index]
            held.madvise(_UNUSED, offset, nbytes)
