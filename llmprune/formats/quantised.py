"""Checkpoints whose matrices are codes of few bits, as the compressed-tensors format `pack-quantized` has them.

A matrix NAME is three tensors: `NAME_packed` (rows, ceil(columns * bits / 32)) int32, the codes of a row, 2^(bits-1) added to
each, lowest bits first; `NAME_scale` (rows, groups), of the checkpoint's dtype; `NAME_shape`, rows and columns. A weight is its
code times its group's scale, in the dtype of the scales. `config.json` has the bits, and which layers have how many columns a
group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from llmprune.base.errors import InputError
from llmprune.base.files import read_json
from llmprune.models.checkpoint import Checkpoint, TensorInfo, opened
from llmprune.numerics.codes import pack, unpack, values, words

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
CONFIG = "quantization_config"  # the key of config.json
_PACKED, _SCALE, _SHAPE = "_packed", "_scale", "_shape"


def code_tensors(name: str, codes: Tensor, scales: Tensor, bits: int) -> dict[str, Tensor]:
    """The three tensors of a matrix: `codes` (rows, columns) whole numbers, `scales` (rows, groups) in the dtype to store."""
    return {name + _PACKED: pack(codes, bits), name + _SCALE: scales.contiguous(), name + _SHAPE: tensor(codes.shape)}


def quantisation_config(bits: int, groups: Mapping[str, int], others: Sequence[str], first: int | None) -> dict[str, Any]:
    """What config.json says.

    Args:
        groups: of each quantised linear layer, by its name in the model, the columns that share a scale.
        others: the linear layers that are not.
        first: the columns whose layers are named first, those of experts: transformers take an expert's scheme from the first
            one that names `experts`, which shared ones may be called, too.
    """
    schemes = {}
    for number, size in enumerate(sorted(set(groups.values()), key=lambda size: (size != first, -size))):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": size,
            "dynamic": False,
        }
        layers = [name for name, own in groups.items() if own == size]
        foreign = [*others, *(name for name, own in groups.items() if own != size)]
        schemes[f"group_{number}"] = {
            "targets": _targets(layers, foreign),
            "weights": {**weights, "actorder": None},
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": sorted(others),
        "config_groups": schemes,
    }


def _targets(layers: Sequence[str], foreign: Sequence[str]) -> list[str]:
    """Patterns that `layers` match and `foreign` ones do not: of each kind of layer one, whatever its block; else names."""
    found: dict[str, None] = {}
    for name in layers:
        kind = re.sub(r"\d+", r"\\d+", re.escape(name))
        found[name if any(re.fullmatch(kind, other) for other in foreign) else f"re:{kind}"] = None
    return list(found)


def stored_bits(folder: Path) -> int | None:
    """The bits of the codes of a folder's matrices; None where it has none.

    Raises:
        InputError: it is quantised in another way.
    """
    path = folder / "config.json"
    raw = read_json(path).get(CONFIG) if path.is_file() else None
    if raw is None:
        return None
    try:
        weights = [group["weights"] for group in raw["config_groups"].values()]
        (bits,) = {one["num_bits"] for one in weights}
        known = raw["quant_method"] == METHOD and raw["format"] == FORMAT and isinstance(bits, int) and 1 <= bits <= 8
        if known and all(one["type"] == "int" and one["symmetric"] is True for one in weights):
            return bits
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    method = raw.get("quant_method", "?") if isinstance(raw, dict) else raw
    raise InputError(
        f"{folder} is quantised by {method} in a way that llmprune does not read: it reads {FORMAT} of one number of bits"
    )


class CodesView(Checkpoint):
    """A folder whose matrices are codes, read as the checkpoint of the weights that they stand for.

    Raises:
        InputError: as `Checkpoint`, or codes, scales and shape do not fit together.
    """

    def __init__(self, folder: Path, bits: int, tensors: Mapping[str, TensorInfo] | None = None) -> None:
        super().__init__(folder, tensors)
        self.bits = bits
        stored = self.tensors
        coded = [name.removesuffix(_PACKED) for name in stored if name.endswith(_PACKED)]
        parts = {name + end for name in coded for end in (_PACKED, _SCALE, _SHAPE)}
        self.tensors = {name: info for name, info in stored.items() if name not in parts}
        self._groups = {name: stored[name + _SCALE].shape[-1] for name in coded if name + _SCALE in stored}
        self.coded = {name: self._info(name, stored) for name in coded}
        self.tensors |= self.coded

    def _info(self, name: str, stored: Mapping[str, TensorInfo]) -> TensorInfo:
        there = [stored.get(name + end) for end in (_PACKED, _SCALE, _SHAPE)]
        packed, scale, shape = there
        if packed is None or scale is None or shape is None or len({one.file for one in there if one}) > 1:
            raise InputError(f"{self.folder} holds {name} in part only, or in several files: get the folder again")
        rows, columns = self._shape(shape.file, name)
        fits = packed.shape == (rows, words(columns, self.bits)) and len(scale.shape) == 2 and scale.shape[0] == rows
        if not fits or scale.dtype is None or scale.shape[1] < 1 or columns % scale.shape[1]:
            raise InputError(f"{self.folder}: codes, scales and shape of {name} do not fit together: get the folder again")
        return TensorInfo(packed.file, (rows, columns), scale.dtype, packed.nbytes + scale.nbytes + shape.nbytes)

    def _shape(self, file: str, name: str) -> tuple[int, int]:
        with opened(self.folder / file) as shard:
            found = shard.get_tensor(name + _SHAPE).tolist()
        if not (isinstance(found, list) and len(found) == 2 and min(found) > 0):
            raise InputError(f"{self.folder / file}: {name} has a shape of {found}: get the folder again")
        return int(found[0]), int(found[1])

    def group_of(self, name: str) -> int:
        """Columns of a coded matrix that share a scale."""
        return self.coded[name].shape[1] // self._groups[name]

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """The codes (rows, columns), int8, and scales (rows, groups) of a matrix."""
        with opened(self.folder / self.coded[name].file) as shard:
            return _read_codes(shard, name, self.bits)

    def stored(self, name: str) -> dict[str, Tensor]:
        return code_tensors(name, *self.codes(name), self.bits) if name in self.coded else super().stored(name)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        yield from super().read([name for name in names if name not in self.coded])
        for name in (name for name in names if name in self.coded):
            yield name, values(*self.codes(name))


def read_values(shard: Any, name: str, bits: int) -> Tensor:
    """The weights of a matrix of an open file: as they are, or from their codes."""
    if name in shard.keys():  # noqa: SIM118
        return shard.get_tensor(name)
    return values(*_read_codes(shard, name, bits))


def _read_codes(shard: Any, name: str, bits: int) -> tuple[Tensor, Tensor]:
    columns = int(shard.get_tensor(name + _SHAPE)[1])
    return unpack(shard.get_tensor(name + _PACKED), bits, columns), shard.get_tensor(name + _SCALE)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Add it to the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | {CONFIG: config}, indent=2) + "\n", encoding="utf-8")
