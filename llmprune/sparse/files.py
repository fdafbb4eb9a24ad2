"""Packed folders: 2:4 matrices as values and codes, everything else as it was.

A packed folder has the files of its dense one (configuration, tokenizer, record) but for the weights. Those are in
`packed-*.safetensors`, and `packed.json` says what they are:

- `format`: "llmprune-2of4"; `version`: 1.
- `layers`: of each packed matrix, by its name in the dense checkpoint, its `shape` [rows, columns] and `dtype`.
- `files`: of each `packed-*.safetensors`, the dense checkpoint's file whose tensors it holds.
- `sha256`: of every file of the folder but itself and the run's record.

A packed matrix NAME is two tensors. `NAME.values` (rows, columns / 2), of the matrix's dtype: the two kept values of each
group of four consecutive weights of a row, in order. `NAME.codes` (rows, ceil(columns / 8)) uint8: four bits a group, the even
group of a pair in the low ones; code 0 to 5 says at which two of the four places the values stand: 0 (0, 1), 1 (0, 2),
2 (0, 3), 3 (1, 2), 4 (1, 3), 5 (2, 3). The other two are +0.0. A spare half byte at a row's end is 0.

Weights have other names than transformers look for, so that they refuse the folder instead of loading it without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.errors import InputError
from llmprune.kernels.reference import compress, expand, violation
from llmprune.models.checkpoint import PACKED, Checkpoint, TensorInfo, opened, read_header, read_json
from llmprune.models.skeleton import Skeleton

FORMAT, VERSION = "llmprune-2of4", 1
_VALUES, _CODES = ".values", ".codes"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True, slots=True)
class Layer:
    """A packed matrix."""

    rows: int
    columns: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class PackedFolder:
    """A packed folder, its manifest checked against the headers of its files.

    Attributes:
        layers: packed matrices, by their names in the dense checkpoint.
        files: of each file, the dense checkpoint's.
        sums: sha256 of every file of the folder but the manifest and the record.
        tensors: everything that the files hold.
    """

    folder: Path
    layers: dict[str, Layer]
    files: dict[str, str]
    sums: dict[str, str]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> PackedFolder:
        """Raises: InputError: it is no packed folder, of another version, or not whole."""
        manifest = read_json(folder / PACKED)
        if manifest.get("format") != FORMAT:
            raise InputError(f"{folder / PACKED} has format {manifest.get('format')!r}; this llmprune reads {FORMAT!r}")
        if manifest.get("version") != VERSION:
            raise InputError(
                f"{folder} is packed in version {manifest.get('version')!r}; this llmprune reads {VERSION}: update llmprune"
            )
        try:
            layers = {str(name): _layer(name, entry) for name, entry in manifest["layers"].items()}
            files = {str(file): str(dense) for file, dense in manifest["files"].items()}
            sums = {str(file): str(digest) for file, digest in manifest["sha256"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{folder / PACKED} has no layers and files that make sense: copy the folder again") from None
        tensors: dict[str, TensorInfo] = {}
        for file in (name for pair in files.items() for name in pair):
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise InputError(f"{folder / PACKED} names {file!r}, which is no safetensors file of a folder")
        for file in files:
            if not (folder / file).is_file():
                raise InputError(f"{folder / file} is missing, though {PACKED} lists it: copy the folder again")
            tensors |= read_header(folder, file)
        found = cls(folder, layers, files, sums, tensors)
        for name, layer in layers.items():
            found._fit(name, layer)
        return found

    def _fit(self, name: str, layer: Layer) -> None:
        """The two tensors of a layer must be there, in the shapes that the manifest says."""
        wanted = {name + _VALUES: (layer.rows, layer.columns // 2), name + _CODES: (layer.rows, -(-layer.columns // 8))}
        for tensor, shape in wanted.items():
            info = self.tensors.get(tensor)
            if info is None or info.shape != shape:
                what = "is missing" if info is None else f"has shape {list(info.shape)}, not {list(shape)}"
                raise InputError(f"{self.folder}: tensor {tensor} {what}: copy the folder again")

    def read(self, tensor: str) -> Tensor:
        with opened(self.folder / self.tensors[tensor].file) as handle:
            return handle.get_tensor(tensor)

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        """A packed matrix's values (rows, columns / 2) and codes (rows, columns / 4).

        Raises:
            InputError: a code or the dtype is none.
        """
        layer, values, halves = self.layers[name], self.read(name + _VALUES), self.read(name + _CODES)
        codes = torch.stack([halves & 15, halves >> 4], dim=2).flatten(1)[:, : layer.columns // 4]
        where = self.folder / self.tensors[name + _CODES].file
        if halves.dtype != torch.uint8 or values.dtype != layer.dtype:
            raise InputError(f"{where}: {name} is of {values.dtype} and {halves.dtype}, not {layer.dtype} and torch.uint8")
        if codes.numel() and int(codes.max()) > 5:
            raise InputError(f"{where}: {name} has a code of {int(codes.max())}, and 5 is the highest: the file is damaged")
        return values, codes.contiguous()

    def others(self) -> list[str]:
        """Tensors that are as they were."""
        packed = {name + end for name in self.layers for end in (_VALUES, _CODES)}
        return [name for name in self.tensors if name not in packed]


class DenseView(Checkpoint):
    """A packed folder, read as the dense checkpoint that it stands for: one matrix at a time is unpacked."""

    def __init__(self, packed: PackedFolder) -> None:
        self.packed, self.folder = packed, packed.folder
        self.tensors = {name: packed.tensors[name] for name in packed.others()}
        for name, layer in packed.layers.items():
            info = packed.tensors[name + _VALUES]
            self.tensors[name] = TensorInfo(info.file, (layer.rows, layer.columns), layer.dtype, 2 * info.nbytes)

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, expand(*self.packed.layer(name)) if name in self.packed.layers else self.packed.read(name)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A dense folder, or a packed one read as dense.

    Raises:
        InputError: it is neither, or not whole.
    """
    return DenseView(PackedFolder.open(folder)) if (folder / PACKED).is_file() else Checkpoint(folder)


def _layer(name: str, entry: Mapping[str, Any]) -> Layer:
    rows, columns = entry["shape"]
    if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0 and columns % 4 == 0):
        raise ValueError(name)
    return Layer(rows, columns, _DTYPES[entry["dtype"]])


def linears(skeleton: Skeleton) -> dict[str, str]:
    """Of each matrix on disk that is a linear layer's whole weight, the layer's name in the model."""
    found = {}
    for name, module in skeleton.model.named_modules():
        if type(module) is nn.Linear:
            pieces = skeleton.names.get(f"{name}.weight", ())
            if len(pieces) == 1 and not pieces[0].part:
                found[pieces[0].disk] = name
    return found


def why_dense(name: str, weight: Tensor, linear: Mapping[str, str]) -> str | None:
    """Why a tensor of the checkpoint is not to be packed; None if it is."""
    if name not in linear:
        return "no linear layer's weight"
    if weight.dtype not in _DTYPES.values():
        return f"of {weight.dtype}"
    return violation(weight)


def left_dense(skeleton: Skeleton) -> dict[str, str]:
    """Matrices of the blocks that are in no linear layer, and so are never packed, and why."""
    return {
        site.name: "stored transposed" if site.transposed else "an expert's, one of several in a tensor"
        for block in skeleton.describe()
        for site in block.sites
        if site.transposed or site.part
    }


def pack_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The two tensors of a packed matrix, as they are stored."""
    values, codes = compress(weight)
    even = functional.pad(codes, (0, codes.shape[1] % 2))
    return {name + _VALUES: values, name + _CODES: (even[:, ::2] | (even[:, 1::2] << 4)).contiguous()}
