"""Small pictures of masks, read from the weights of a run: where they are dense, and a corner weight by weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.base.errors import InputError
from llmprune.formats.packed import open_checkpoint
from llmprune.job.record import SiteRecord
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.sites import read_part
from llmprune.numerics.patterns import NM, parse

_CELLS = (32, 96)  # at most, of a picture: down, across
_CORNER = (12, 24)


class Mask(TypedDict):
    """Of one matrix: the share of weights that stayed by cell, and whether each weight of its first corner did.

    `columns` are those that the cells cover: all of them or, where the pattern makes every cell alike, the first ones singly.
    """

    site: str
    pattern: str
    period: int
    rows: int
    columns: int
    density: list[list[float]]
    corner: list[list[int]]


def masks(folder: Path, sites: Sequence[SiteRecord], count: int) -> list[Mask]:
    """Of `count` matrices, spread over the model.

    Raises:
        InputError: the folder's weights are not whole, or not the record's.
    """
    last = len(sites) - 1
    chosen = dict.fromkeys(round(number * last / max(count - 1, 1)) for number in range(count) if last >= 0)
    checkpoint = open_checkpoint(folder) if chosen else None
    return [_mask(checkpoint, sites[number]) for number in chosen] if checkpoint else []


def _mask(checkpoint: Checkpoint, site: SiteRecord) -> Mask:
    kept = _matrix(checkpoint, site) != 0
    pattern = parse(site.pattern)
    period = pattern.m if isinstance(pattern, NM) else 1
    shown = kept[:, : _CELLS[1] // period * period] if period > 1 else kept
    cells = min(_CELLS[0], shown.shape[0]), min(_CELLS[1], shown.shape[1])
    density = functional.adaptive_avg_pool2d(shown[None].double(), cells)[0]
    corner = kept[: _CORNER[0], : _CORNER[1] // period * period or _CORNER[1]]
    return {
        "site": site.name,
        "pattern": site.pattern,
        "period": period,
        "rows": shown.shape[0],
        "columns": shown.shape[1],
        "density": [[round(share, 3) for share in row] for row in density.tolist()],
        "corner": corner.int().tolist(),
    }


def _matrix(checkpoint: Checkpoint, site: SiteRecord) -> Tensor:
    """(out, in)."""
    if site.tensor not in checkpoint.tensors:
        raise InputError(f"{checkpoint.folder} holds no tensor {site.tensor}, which its record lists: copy the folder again")
    [(_, tensor)] = checkpoint.read([site.tensor])
    try:
        matrix = tensor[read_part(site.part)]
    except (IndexError, ValueError, TypeError):
        raise InputError(f"{checkpoint.folder}: tensor {site.tensor} has no part {site.part[:40]!r}") from None
    matrix = matrix.T if site.transposed else matrix
    if tuple(matrix.shape) != site.shape or not torch.is_floating_point(matrix):
        shape = list(matrix.shape)
        raise InputError(f"{checkpoint.folder}: {site.name} is {shape} on disk and {list(site.shape)} in the record")
    return matrix
