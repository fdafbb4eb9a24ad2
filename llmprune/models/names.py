"""Which tensor on disk is which part of the model's tensors, by transformers' own rules of renaming and merging.

Of the rules that merge tensors on loading, those of experts are known: experts stacked, gate above up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from llmprune.base.errors import InputError
from llmprune.base.words import count
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.families import LEFT_OVER
from llmprune.models.sites import Part


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor on disk, and the part of the model's tensor that it is."""

    disk: str
    part: Part = ()


Names = dict[str, tuple[Piece, ...]]  # of each of the model's tensors, the tensors on disk that it is made of


def locate(pieces: Sequence[Piece], part: Part) -> Piece:
    """Where on disk a part of the model's tensor is: here `part` is that of the tensor on disk."""
    whole = next((Piece(piece.disk) for piece in pieces if piece.part == part), None)
    return whole or Piece(pieces[0].disk, part)


def match_names(model: PreTrainedModel, checkpoint: Checkpoint) -> Names:
    """Where the model's tensors are in the checkpoint.

    Raises:
        InputError: tensors are missing, unexpected, of another shape, not floating point, or merged in an unknown way.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found: dict[str, list[Piece]] = {}
    for disk in checkpoint.tensors:
        name, source = rename_source_key(disk, renamings, converters, model.base_model_prefix, state)
        found.setdefault(name, []).append(Piece(disk, _place(disk, source, converters, checkpoint) if source else ()))
    _compare(model, state, found, checkpoint)
    return {name: tuple(pieces) for name, pieces in found.items() if name in state}


def _place(disk: str, source: str, converters: Sequence[WeightConverter], checkpoint: Checkpoint) -> Part:
    """The expert that a tensor on disk belongs to and, where several are put together, its rows."""
    converter = next(c for c in converters if source in c.source_patterns)
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    number = re.search(re.escape(source).replace(r"\*\.", r"(\d+)\."), disk)
    stacked, put_together = (MergeModulelist, 0), (Concatenate, 1)
    known = kinds in ([stacked], [stacked, put_together]) and len(converter.target_patterns) == 1
    if not known or number is None or not number.groups():
        raise InputError(f"{checkpoint.folder}: {disk} is merged with others on loading in a way that is not supported yet")
    expert = int(number[1])
    if len(kinds) == 1:
        return (expert,)
    rows = checkpoint.tensors[disk].shape[0]
    first = converter.source_patterns.index(source) * rows
    return (expert, slice(first, first + rows))


def _compare(model: PreTrainedModel, state: dict[str, Tensor], found: dict[str, list[Piece]], checkpoint: Checkpoint) -> None:
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *(row.name for row in LEFT_OVER)]
    ignored = [re.compile(pattern) for pattern in patterns]
    tied = model.all_tied_weights_keys.items()
    there = {name for pair in tied if any(one in found for one in pair) for name in pair}  # of tied tensors one is enough
    missing = [name for name in state if name not in found and name not in there]
    foreign = [name for name in found if name not in state and not any(p.search(name) for p in ignored)]
    unexpected = [piece.disk for name in foreign for piece in found[name]]
    for what, wrong in (("lacks", missing), ("holds unexpected", unexpected)):
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise InputError(
                f"{checkpoint.folder} {what} tensors of {type(model).__name__}: {', '.join(wrong[:3])}{more}; "
                "config.json and the weights do not belong together"
            )
    for name, pieces in found.items():
        if name in state:
            _fit(name, state[name].shape, pieces, checkpoint)


def _fit(name: str, shape: torch.Size, pieces: Sequence[Piece], checkpoint: Checkpoint) -> None:
    """The pieces must make up the whole tensor, each in its place."""
    whole = torch.empty(shape, device="meta")
    for piece in pieces:
        info = checkpoint.tensors[piece.disk]
        try:
            asked = tuple(whole[piece.part].shape)
        except IndexError:
            raise InputError(
                f"{checkpoint.folder} holds {piece.disk}, config.json asks for {count(shape[0], 'expert')}"
            ) from None
        if asked != info.shape:
            raise InputError(
                f"tensor {piece.disk} in {checkpoint.folder / info.file} has shape {list(info.shape)}, "
                f"config.json asks for {list(asked)}"
            )
        if info.dtype is None:
            raise InputError(f"tensor {piece.disk} in {checkpoint.folder / info.file} is not floating point: quantised?")
    if sum(math.prod(checkpoint.tensors[piece.disk].shape) for piece in pieces) != shape.numel():
        how = "more than once" if len({str(piece.part) for piece in pieces}) < len(pieces) else "in part only"
        raise InputError(f"{checkpoint.folder} holds {name} {how}, as {', '.join(piece.disk for piece in pieces[:3])}, ...")
