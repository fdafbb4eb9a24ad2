"""llmprune prunes Hugging Face language models after training, one decoder block at a time.

>>> import llmprune
>>> result = llmprune.prune("llama", sparsity="2:4", output="llama-2of4")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmprune.errors import InputError

if TYPE_CHECKING:
    from llmprune.hub import push
    from llmprune.integrity import verify
    from llmprune.pipeline import Result, load, prune
    from llmprune.sparse.convert import pack, unpack

__version__ = "0.1.0"
__all__ = ["InputError", "Result", "__version__", "load", "pack", "prune", "push", "unpack", "verify"]

_HOMES = dict.fromkeys(("Result", "load", "prune"), "llmprune.pipeline") | {
    "push": "llmprune.hub",
    "verify": "llmprune.integrity",
    "pack": "llmprune.sparse.convert",
    "unpack": "llmprune.sparse.convert",
}


def __getattr__(name: str) -> Any:
    """Import the heavy parts only when they are asked for: `llmprune --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
