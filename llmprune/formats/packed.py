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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.base.errors import InputError
from llmprune.base.files import PACKED, differing, read_json
from llmprune.formats.kernels.reference import compress, expand, violation
from llmprune.formats.quantised import CodesView, stored_bits
from llmprune.models.checkpoint import Checkpoint, TensorInfo, opened, read_header
from llmprune.models.skeleton import Skeleton

T = TypeVar("T")
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
    """A packed folder, its manifest compared with the headers of its files.

    Attributes:
        layers: packed matrices, by their names in the dense checkpoint.
        files: of each file, the dense checkpoint's.
        sums: sha256 of every file of the folder but the manifest and the record.
        tensors: everything that the files hold.
        problems: why it is not whole; `open` returns none that has any.
    """

    folder: Path
    layers: dict[str, Layer]
    files: dict[str, str]
    sums: dict[str, str]
    tensors: dict[str, TensorInfo]
    problems: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> PackedFolder:
        """Raises: InputError: it is no packed folder, of another version, or not whole."""
        found = cls.survey(folder)
        if found.problems:
            raise InputError(found.problems[0])
        return found

    @classmethod
    def survey(cls, folder: Path) -> PackedFolder:
        """What can be read of a folder that may be damaged.

        Raises:
            InputError: it is of another format or version.
        """
        problems: list[str] = []
        layers, files, sums = _manifest(folder, problems)
        tensors = _headers(folder, files, problems)
        found = cls(folder, layers, files, sums, tensors)
        known = [name for name in layers if not problems or found._there(name)]  # files that cannot be read hold the others
        misfits = [why for name in known if (why := found._misfit(name))]
        return replace(found, problems=(*problems, *misfits))

    def _there(self, name: str) -> bool:
        return {name + _VALUES, name + _CODES} <= self.tensors.keys()

    def _misfit(self, name: str) -> str | None:
        """The two tensors of a layer must be there, in the shapes that the manifest says."""
        layer = self.layers[name]
        wanted = {name + _VALUES: (layer.rows, layer.columns // 2), name + _CODES: (layer.rows, -(-layer.columns // 8))}
        for tensor, shape in wanted.items():
            info = self.tensors.get(tensor)
            if info is None or info.shape != shape:
                what = "is missing" if info is None else f"has shape {list(info.shape)}, not {list(shape)}"
                return f"{self.folder}: tensor {tensor} {what}: copy the folder again"
        return None

    def whole(self) -> list[str]:
        """The packed matrices that are there."""
        return [name for name in self.layers if self._misfit(name) is None]

    def check(self, names: Iterable[str]) -> None:
        """Files of it must be what their sums say.

        Raises:
            InputError: one is missing or differs.
        """
        for problem in differing(self.folder, {name: self.sums.get(name, "") for name in names}):
            raise InputError(f"{self.folder} is damaged ({problem}): copy the folder again")

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
    """A dense folder; or a packed or a quantised one, read as the weights that it stands for.

    Raises:
        InputError: it is none of them, or not whole.
    """
    if (folder / PACKED).is_file():
        return DenseView(PackedFolder.open(folder))
    bits = stored_bits(folder)
    return Checkpoint(folder) if bits is None else CodesView(folder, bits)


def _manifest(folder: Path, problems: list[str]) -> tuple[dict[str, Layer], dict[str, str], dict[str, str]]:
    """Layers, files and sums, as far as they make sense; adds to `problems`.

    Raises:
        InputError: the folder is of another format or version.
    """
    try:
        manifest = read_json(folder / PACKED)
    except InputError as error:
        problems.append(str(error))
        manifest = {"format": FORMAT, "version": VERSION, "layers": {}, "files": {}, "sha256": {}}
    if manifest.get("format") != FORMAT:
        raise InputError(f"{folder / PACKED} has format {manifest.get('format')!r}; this llmprune reads {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{folder} is packed in version {manifest.get('version')!r}; this llmprune reads {VERSION}: update llmprune"
        )
    layers = _mapping(manifest.get("layers"), _layer)
    files, sums = (_mapping(manifest.get(name), lambda _, value: str(value)) for name in ("files", "sha256"))
    if layers is None or files is None or sums is None:
        problems.append(f"{folder / PACKED} has no layers and files that make sense: copy the folder again")
    for file in (name for pair in (files or {}).items() for name in pair):
        if Path(file).name != file or not file.endswith(".safetensors"):
            problems.append(f"{folder / PACKED} names {file!r}, which is no safetensors file of a folder")
    if problems:  # whatever the packed files are
        files = {path.name: path.name for path in sorted(folder.glob("packed-*.safetensors"))}
    return layers or {}, files or {}, sums or {}


def _headers(folder: Path, files: Iterable[str], problems: list[str]) -> dict[str, TensorInfo]:
    """What the files hold, as far as they can be read; adds to `problems`."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not (folder / file).is_file():
            problems.append(f"{folder / file} is missing, though {PACKED} lists it: copy the folder again")
            continue
        try:
            tensors |= read_header(folder, file)
        except InputError as error:
            problems.append(str(error))
    return tensors


def _mapping(value: Any, read: Callable[[str, Any], T]) -> dict[str, T] | None:
    """A part of the manifest; None if it makes no sense."""
    try:
        return {str(name): read(name, entry) for name, entry in value.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


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


def packed_bytes(rows: int, columns: int, itemsize: int) -> int:
    """Of a packed matrix whose weights take `itemsize` bytes each."""
    return rows * (columns // 2 * itemsize + -(-columns // 8))


def pack_tensors(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The two tensors of a packed matrix, as they are stored."""
    values, codes = compress(weight)
    even = functional.pad(codes, (0, codes.shape[1] % 2))
    return {name + _VALUES: values, name + _CODES: (even[:, ::2] | (even[:, 1::2] << 4)).contiguous()}
