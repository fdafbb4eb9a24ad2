"""Read a safetensors checkpoint folder, one tensor at a time, trusting nothing that it says.

Checked before any work: the index is JSON with a `weight_map`, names no file outside its folder, every file is there
and whole, every indexed tensor is in its file. Leaves out pickled checkpoints: reading them can run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.base.errors import InputError
from llmprune.base.files import INDEX, PACKED, SINGLE, read_json

_LFS_POINTER = b"version https://git-lfs"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # of dtypes that are no floating point; else one


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it is, from its file's header. `dtype` is None for one that is not floating point."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    nbytes: int


class Checkpoint:
    """A folder of safetensors files.

    Attributes:
        tensors: what the folder holds, by name on disk. Those that are given are taken as they are.

    Raises:
        InputError: the folder is not a whole, safe checkpoint; the message names the file.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo] | None = None) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = dict(tensors or {})
        if tensors is not None:
            return
        wanted = _weight_map(folder)
        for file in sorted(set(wanted.values())) or [SINGLE]:
            found = read_header(folder, file)
            if twice := found.keys() & self.tensors.keys():
                name = min(twice)
                raise InputError(f"{folder} holds tensor {name} twice, in {self.tensors[name].file} and in {file}")
            self.tensors.update(found)
        if wanted:
            self._match_index(wanted)

    def _match_index(self, wanted: dict[str, str]) -> None:
        for name, file in wanted.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise InputError(f"{self.folder / INDEX} places tensor {name} in {file}, which does not hold it")
        for name, info in self.tensors.items():
            if name not in wanted:
                raise InputError(f"{self.folder / INDEX} does not list tensor {name}, which {info.file} holds")

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors called `names`, file by file. Each is a view of a mapped file, which stays mapped while it lives."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, members in by_file.items():
            with opened(self.folder / file) as handle:
                for name in members:
                    yield name, handle.get_tensor(name)

    def stored(self, name: str) -> dict[str, Tensor]:
        """The tensors on disk that hold what is read as `name`."""
        return dict(self.read([name]))

    def fingerprint(self) -> str:
        """Changes with the configuration, and with any file's size or date."""
        files = sorted({info.file for info in self.tensors.values()})
        stats = [(self.folder / file).stat() for file in files]
        state = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]
        config = (self.folder / "config.json").read_bytes()
        return hashlib.sha256(config + json.dumps(state).encode()).hexdigest()[:16]

    def largest(self) -> int:
        """Bytes of the largest tensor."""
        return max(info.nbytes for info in self.tensors.values())

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """`safe_open` whose errors name the file and the likely cause."""
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({_diagnosis(path, error)}); download it again") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _diagnosis(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        return "a Git LFS pointer: run `git lfs pull`"
    return "empty" if not head else f"truncated or corrupt: {error}"


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file, or nothing for a single-file checkpoint."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return {}
        if (folder / PACKED).is_file():
            raise InputError(f"{folder} is packed: llmprune unpack it first")
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"{pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else "is it a model?"
        raise InputError(f"{folder} holds no {SINGLE} and no {INDEX}; {hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index} has no weight_map of tensor names to files")
    for file in set(weight_map.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"{index} points outside its folder or at no safetensors file: {file!r}")
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing, though {INDEX} lists it; download it again")
    return weight_map


def read_header(folder: Path, file: str) -> dict[str, TensorInfo]:
    """What a file holds, by name."""
    with opened(folder / file) as handle:
        return {name: _info(file, handle.get_slice(name)) for name in handle.keys()}  # noqa: SIM118


def _info(file: str, slice_: Any) -> TensorInfo:
    shape = tuple(slice_.get_shape())
    called = slice_.get_dtype()
    dtype = _DTYPES.get(called)
    size = dtype.itemsize if dtype else _OTHER_BYTES.get(called, 1)
    return TensorInfo(file, shape, dtype, int(torch.Size(shape).numel()) * size)
