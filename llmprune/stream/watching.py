"""See what reaches the matrices of a block while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from llmprune.models.sites import Site

Look: TypeAlias = Callable[[Site, Tensor, "Tensor | None"], None]  # a site, its input, and which of the batch's positions it is


class StageReached(Exception):
    """Leaves a block's forward once all that was asked for has been counted."""


@contextmanager
def hooked(sites: Sequence[Site], see: Callable[[Site, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Call `see(site, input, tokens)` before each of the sites is used; see `Site.watch`."""
    handles = [site.watch(functools.partial(see, site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gain(norm: nn.Module, like: Tensor) -> Tensor:
    """What a norm multiplies by: half of what it makes of alternating ones, less what it makes of their opposite."""
    ones = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
    ones[1::2] = -1
    return ((norm(ones[None]) - norm(-ones[None]))[0] / 2 * ones).float()


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.numel() > 0 and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
