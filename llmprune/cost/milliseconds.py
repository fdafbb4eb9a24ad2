"""Milliseconds of a model's parts, as measured on this machine: a table that is kept, and what it says of other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from llmprune.base.cache import cache_file, recall, remember
from llmprune.base.hardware import dtype_name, processor_name
from llmprune.base.version import __version__


@dataclass(slots=True)
class Table:
    """Milliseconds by row; a row's name has operator, shape, pattern and tokens.

    Attributes:
        path: where it is kept, by device, threads, dtype and versions; None: nowhere.
    """

    rows: dict[str, float]
    path: Path | None = None

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Table:
        """What is known of `device` in `dtype`."""
        threads = "" if device.type == "cuda" else f" {torch.get_num_threads()} threads"
        name = f"speed {processor_name(device)}{threads} {dtype_name(dtype)} torch {torch.__version__} {__version__}"
        path = cache_file(name)
        return cls({row: ms for row, ms in recall(path).items() if isinstance(ms, float) and ms > 0}, path)

    def keep(self, rows: Mapping[str, float]) -> None:
        """Add rows, here and in the cache folder."""
        self.rows |= rows
        remember(self.path, recall(self.path) | self.rows)


@dataclass(frozen=True, slots=True)
class Pace:
    """Milliseconds of one call of a model.

    Attributes:
        outside: of embeddings, head and all else that does not depend on how many layers there are.
        layer: of a whole layer.
        smaller: of a layer that has lost so many parts of one kind, by kind and number.
    """

    outside: float
    layer: float
    smaller: Mapping[str, Mapping[int, float]]

    def saved(self, kind: str, gone: int) -> float:
        """What a layer takes less with `gone` parts fewer: between the numbers that were measured on a straight line, and
        never more time for fewer parts (isotonic regression, whose error is least among such curves)."""
        counts = [0, *sorted(self.smaller[kind])]
        times = [self.layer, *(self.smaller[kind][count] for count in counts[1:])]
        falling = isotonic_regression(np.minimum(times, self.layer), increasing=False).x
        return float(self.layer - np.interp(gone, counts, falling))

    def of(self, layers: int) -> float:
        """Of the model with so many whole layers."""
        return self.outside + layers * self.layer
