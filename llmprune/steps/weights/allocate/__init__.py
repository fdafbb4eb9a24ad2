"""Ways to spread a sparsity over matrices, one file each. A file `name.py` here *is* the way `name`: see `base.Allocator`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.base.plugins import Plugins

if TYPE_CHECKING:
    from llmprune.steps.weights.allocate.base import Allocator

ALLOCATORS: Plugins[Allocator] = Plugins(__name__, "allocation")
