"""llmprune prunes Hugging Face language models after training, one decoder block at a time.

>>> import llmprune
>>> result = llmprune.prune("llama", sparsity="2:4", output="llama-2of4")  # doctest: +SKIP

`api.py` lists all that there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmprune.base.errors import InputError
from llmprune.base.version import __version__

if TYPE_CHECKING:
    from llmprune.api import (
        Result,
        bench,
        compare,
        evaluate,
        load,
        pack,
        prune,
        push,
        quantise,
        recover,
        report,
        scan,
        unpack,
        verify,
    )

__all__ = [
    "InputError", "Result", "__version__", "bench", "compare", "evaluate", "load", "pack", "prune", "push", "quantise",
    "recover", "report", "scan", "unpack", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the heavy parts only when they are asked for: `llmprune --help` must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llmprune import api

    return getattr(api, name)
