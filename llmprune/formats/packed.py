"""Packed folders: sparse matrices without their zeros, everything else as it was.

A packed folder has the files of the one that it was made from (configuration, tokenizer, record) but for the weights. Those are
in `packed-*.safetensors`, and `packed.json` says what they are:

- `format`: "llmprune-packed"; `version`: 2.
- `layers`: of each packed matrix, by its name in the folder that it was made from, its `shape` [rows, columns], `dtype` and
  `kind`, "2of4" or "bitmask"; of one of codes their `bits`, and how many `groups` of columns have a scale of their own.
- `files`: of each `packed-*.safetensors`, that folder's file whose tensors it holds.
- `sha256`: of every file of the folder but itself and the run's record.

A matrix NAME of kind "2of4" is two tensors. `NAME.values` (rows, columns / 2), of the matrix's dtype: the two kept values of
each group of four consecutive weights of a row, in order. `NAME.codes` (rows, ceil(columns / 8)) uint8: four bits a group, the
even group of a pair in the low ones; code 0 to 5 says at which two of the four places the values stand: 0 (0, 1), 1 (0, 2),
2 (0, 3), 3 (1, 2), 4 (1, 3), 5 (2, 3). The other two are +0.0. A spare half byte at a row's end is 0.

A matrix of kind "bitmask" is `NAME.mask`, `NAME.values` and, where its values are codes, `NAME.scale`, as
`formats/kernels/bitmask.py` says. Each is whole tiles, or begins on a whole byte: kernels can read them where they are mapped.

Version 1, format "llmprune-2of4", had the first kind only, and named none.

Weights have other names than transformers look for, so that they refuse the folder instead of loading it without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from llmprune.base.errors import InputError
from llmprune.base.files import PACKED, differing, read_json
from llmprune.formats.kernels.bitmask import Bitmask
from llmprune.formats.matrices import Layer, TwoOfFour
from llmprune.formats.quantised import CodesView, code_tensors, stored_bits
from llmprune.models.checkpoint import Checkpoint, TensorInfo, opened, read_header
from llmprune.models.names import locate
from llmprune.models.skeleton import Skeleton

T = TypeVar("T")
FORMAT, VERSION = "llmprune-packed", 2
_OLD = ("llmprune-2of4", 1)


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
        return self.layers[name].shapes(name).keys() <= self.tensors.keys()

    def _misfit(self, name: str) -> str | None:
        """The tensors of a layer must be there, in the shapes that the manifest says."""
        for tensor, shape in self.layers[name].shapes(name).items():
            info = self.tensors.get(tensor)
            sized = info and len(info.shape) == len(shape) and all(b in (a, -1) for a, b in zip(info.shape, shape, strict=True))
            if info is None or not sized:
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

    def layer(self, name: str) -> TwoOfFour | Bitmask:
        """A packed matrix.

        Raises:
            InputError: its tensors are not what they must be.
        """
        layer, where = self.layers[name], ""
        try:
            return layer.decode(name, {tensor: self.read(tensor) for tensor in layer.shapes(name)})
        except ValueError as error:
            where = self.tensors[next(iter(layer.shapes(name)))].file
            raise InputError(f"{self.folder / where}: {name} {error}") from None

    def others(self) -> list[str]:
        """Tensors that are as they were."""
        packed = {tensor for name, layer in self.layers.items() for tensor in layer.shapes(name)}
        return [name for name in self.tensors if name not in packed]

    def unpacked_bytes(self) -> int:
        """Of all tensors of the folder that was packed."""
        return sum(self.tensors[name].nbytes for name in self.others()) + sum(own.nbytes() for own in self.layers.values())


class DenseView(Checkpoint):
    """A packed folder, read as the weights that it stands for: one matrix at a time is unpacked."""

    def __init__(self, packed: PackedFolder) -> None:
        others = {name: packed.tensors[name] for name in packed.others()}
        bits = stored_bits(packed.folder)
        self._others = Checkpoint(packed.folder, others) if bits is None else CodesView(packed.folder, bits, others)
        super().__init__(packed.folder, self._others.tensors)
        self.packed = packed
        for name, layer in packed.layers.items():
            file = packed.tensors[next(iter(layer.shapes(name)))].file
            self.tensors[name] = TensorInfo(file, (layer.rows, layer.columns), layer.dtype, layer.nbytes())

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        packed = self.packed.layers
        yield from self._others.read([name for name in names if name not in packed])
        for name in (name for name in names if name in packed):
            yield name, self.packed.layer(name).weight()

    def stored(self, name: str) -> dict[str, Tensor]:
        """The tensors that hold it in the folder that was packed."""
        layer = self.packed.layers.get(name)
        if layer is None:
            return self._others.stored(name)
        found = self.packed.layer(name)
        if isinstance(found, Bitmask) and found.scale is not None and layer.bits is not None:
            return code_tensors(name, found.stored(), found.scale, layer.bits)
        return {name: found.weight()}


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
    kind, version = manifest.get("format"), manifest.get("version")
    if kind not in (FORMAT, _OLD[0]):
        raise InputError(f"{folder / PACKED} has format {kind!r}; this llmprune reads {FORMAT!r}")
    if (kind, version) not in ((FORMAT, VERSION), _OLD):
        raise InputError(f"{folder} is packed in version {version!r}; this llmprune reads {VERSION}: update llmprune")
    layers = _mapping(manifest.get("layers"), Layer.read)
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


def linears(skeleton: Skeleton) -> dict[str, str]:
    """Of each matrix on disk that is a linear layer's whole weight, the layer's name in the model."""
    found = {}
    for name, module in skeleton.model.named_modules():
        if type(module) is nn.Linear:
            pieces = skeleton.names.get(f"{name}.weight", ())
            if len(pieces) == 1 and not pieces[0].part:
                found[pieces[0].disk] = name
    return found


def packable(skeleton: Skeleton) -> tuple[dict[str, str], dict[str, str]]:
    """Matrices on disk that can be packed, linear layers' and experts', and their names in the model; and by name those of the
    blocks that cannot, and why.
    """
    able, never = linears(skeleton), {}
    for site in (site for block in skeleton.describe() for site in block.sites):
        place = locate(skeleton.names[site.parameter], site.part)
        if site.transposed or place.part:
            never[site.name] = "stored transposed" if site.transposed else "an expert's, one of several in a tensor"
        else:
            able[place.disk] = site.name
    return able, never
