"""The loop that everything runs on, and what it runs over.

Pruning weights, removing heads, measuring sensitivity: each is a `visit` on this loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from llmprune.models.sites import Block


class Source(Protocol):
    def blocks(self) -> Iterator[Block]:
        """Each decoder block in order, its weights loaded until the next one is asked for."""
        ...


class Feed(Protocol):
    def advance(self, block: Block) -> None:
        """Run `block` as it is now; its outputs become the next block's inputs."""
        ...


class Sink(Protocol):
    def put(self, block: Block) -> None:
        """Keep the finished `block`."""
        ...


def stream(source: Source, feed: Feed, sink: Sink, visit: Callable[[Block], None]) -> None:
    """Visit, advance and keep each block of `source`."""
    for block in source.blocks():
        visit(block)
        feed.advance(block)
        sink.put(block)
