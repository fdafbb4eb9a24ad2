"""The processes that share a run, as `accelerate launch` or `torchrun` starts them: each has its share of the windows.

Every process holds the same model and reaches the same lines in the same order. Sums are taken in the order of the ranks:
they are the same to the last bit on every process, and whenever as many processes run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from llmprune.base.errors import InputError, LostProcess, reason

T = TypeVar("T")
_ANSWER = timedelta(seconds=10)  # for the launcher, where it is still there
_PATIENCE = timedelta(hours=2)  # for one to solve alone; gloo notices a process that has died at once, by its connections


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that share the run; alone by default, and then every method is the identity.

    Attributes:
        rank: 0 is the first, which shows and writes.
        size: how many processes there are.
        local: this process's number on its machine, which is that of its GPU.
        here: how many of them run on this machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    here: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> None:
        """Replace `tensor` by the sum of all processes' own."""
        if self.size == 1:
            return
        own = tensor.clone()
        tensor.zero_()
        for rank in range(self.size):
            tensor += self.of(rank, own if rank == self.rank else torch.empty_like(own))

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """The sum over all processes of each number, in float64."""
        if self.size == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.add_up(sums)
        return tuple(sums.tolist())

    def of(self, rank: int, tensor: Tensor) -> Tensor:
        """The tensor of process `rank`; those of the others are overwritten with it."""
        if self.size > 1:
            with _while_all_live():
                whole = tensor.contiguous()  # NCCL takes no other
                distributed.broadcast(whole, rank)
            if whole is not tensor:
                tensor.copy_(whole)
        return tensor

    def all(self, value: T) -> list[T]:
        """Every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _while_all_live():
            distributed.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """The first process's value."""
        if self.size == 1:
            return value
        values = [value]
        with _while_all_live():
            distributed.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that a launcher started together, or that the caller has already joined; else this one alone."""
    if distributed.is_available() and distributed.is_initialized():
        if "gloo" not in (backends := distributed.get_backend_config()):
            raise InputError(f"the process group has {backends} only: initialise it with backend='cpu:gloo,cuda:nccl'")
        yield _ranks()
        return
    if not _launched(("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        yield Ranks()
        return
    with _while_all_live():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield _ranks()
    finally:
        distributed.destroy_process_group()


def comes_first(text: str) -> bool:
    """Whether this process is the first, of those that `torchrun` started together, to ask about the text, by its store."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_ANSWER)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.add(f"llmprune/{attempt}/{text}", 1) == 1)
    except RuntimeError:  # the launcher has ended, and whatever it started
        return True


def _ranks() -> Ranks:
    """This process in the group, and on its machine as the launcher says; without a launcher, all are on this one."""
    size = distributed.get_world_size()
    local, here = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", size)))
    return Ranks(distributed.get_rank(), size, local, here)


def _launched(variables: Sequence[str]) -> bool:
    """Whether a launcher has told this process who it is, and that it is not alone."""
    if not all(name in os.environ for name in variables):
        return False
    try:
        return int(os.environ["WORLD_SIZE"]) > 1
    except ValueError:
        raise InputError(f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']}, which is no number: unset it") from None


@contextmanager
def _while_all_live() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise LostProcess(f"another process of this run has ended, see its error ({reason(error, 80)})") from None
