"""Matrices solved at several patterns, on disk: which weights each keeps, one bit a weight, and what those are.

One safetensors file a matrix (of experts: all of one kind in a layer) and pattern, there whole or not at all. Of several
processes the first one reads and writes, and tells the others.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.base.notation import in_file_name
from llmprune.base.processes import Ranks
from llmprune.models.sites import Site
from llmprune.numerics.patterns import Pattern
from llmprune.steps.weights.allocate.base import share

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Library:
    """`folder`: where the files are; None on a process that neither reads nor writes."""

    folder: Path | None
    ranks: Ranks

    def has(self, name: str, patterns: Iterable[str]) -> bool:
        """Whether the matrix called `name` is there, whole, at all `patterns`."""
        return self.folder is not None and all(_whole(self._file(name, pattern)) for pattern in patterns)

    def put(self, name: str, pattern: Pattern, solved: Sequence[tuple[Site, Tensor]]) -> None:
        """Keep the weights of all sites of one name, rounded as they would be saved."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for site, weight in solved:
            rounded = weight.to(site.storage).cpu()
            kept = rounded != 0
            tensors |= {f"{site.name}.mask": packed(kept), f"{site.name}.kept": rounded[kept]}
        file = self._file(name, str(pattern))
        draft = file.with_suffix(".draft")
        save_file(tensors, draft)
        draft.replace(file)

    def get(self, name: str, pattern: Pattern, sites: Sequence[Site]) -> list[Tensor]:
        """The weights of `sites`, all of one name, (out, in)."""
        tensors = load_file(self._file(name, str(pattern))) if self.folder is not None else {}
        found = []
        for site in sites:
            weight = torch.zeros(site.rows, site.columns, dtype=site.storage)
            if tensors:
                kept = unpacked(tensors[f"{site.name}.mask"], weight.numel()).view(weight.shape)
                weight.masked_scatter_(kept, tensors[f"{site.name}.kept"])
            found.append(self.ranks.of(0, weight.to(site.weight.device)))
        return found

    def clear(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str, pattern: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name.replace('*', 'all')}-{in_file_name(pattern)}.safetensors"


def group_name(site: Site) -> str:
    """What a site's matrices have in common: its name or, of an expert's, the name with * for the expert's number."""
    if site.pool is None:
        return site.name
    return re.sub(rf"\.{site.part[0]}\.([^.]+)$", r".*.\1", site.name)


def library_bytes(weights: int, patterns: Iterable[Pattern], dtype: torch.dtype) -> int:
    """What so many weights take at all `patterns`."""
    return int(sum(weights * (dtype.itemsize * share(pattern) + 1 / 8) for pattern in patterns))


def packed(mask: Tensor) -> Tensor:
    """Eight bits a byte, the first one lowest."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    return (bits.view(-1, 8) * _BITS).sum(-1, dtype=torch.uint8)


def unpacked(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits."""
    return (packed[:, None] & _BITS).ne(0).flatten()[:count]


def _whole(file: Path) -> bool:
    """Whether the file is as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
