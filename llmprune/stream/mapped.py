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

from llmprune.errors import InputError


class MappedTensors(MutableSequence[Tensor]):
    """A list of tensors on the disk of `folder`. What is set must have the shape and dtype of what it replaces.

    Raises:
        InputError: the disk is full.
    """

    def __init__(self, folder: Path, tensors: Iterable[Tensor] = ()) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as this
        self._maps: list[mmap.mmap] = []
        self._tensors: list[Tensor] = []
        self._size = self._in_use = 0
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
        try:
            os.posix_fallocate(self._file.fileno(), self._size, value.nbytes)  # a full disk shows here, not as a bus error
        except OSError as error:
            raise InputError(f"no room for the activations in {self._folder}: {error.strerror}") from None
        self._maps.append(mmap.mmap(self._file.fileno(), value.nbytes, offset=self._size))
        self._tensors.append(torch.frombuffer(self._maps[-1], dtype=value.dtype).view(value.shape))
        self._size += -(-value.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self[index] = value

    def _let_go(self, index: int) -> None:
        """Of the memory that a tensor takes; it is read again when it is touched."""
        if index < len(self):
            self._maps[index].madvise(mmap.MADV_DONTNEED)
