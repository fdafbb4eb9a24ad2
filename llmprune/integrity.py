"""Re-check a folder that llmprune wrote: every file's sha256, and the pattern or the codes of every matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from llmprune.errors import InputError, plain_errors, reason, user_path
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.files import PACKED, read_json
from llmprune.models.sites import read_part
from llmprune.patterns import Pattern, parse
from llmprune.sparse.files import PackedFolder
from llmprune.stream.publish import RECORD, SCHEMA, sha256
from llmprune.stream.resume import MANIFEST

_DOWNLOADED = (".gitattributes", ".git", ".cache")  # what a download from the Hub adds


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found; `problems` is empty when all holds.

    Attributes:
        sums: sha256 that the record, or the packed folder's manifest, says of every file but itself.
    """

    files: int
    matrices: int
    problems: tuple[str, ...]
    sums: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Claim:
    """That a part of a tensor on disk is a matrix of a pattern."""

    tensor: str
    part: str
    pattern: Pattern
    transposed: bool

    @classmethod
    def read(cls, site: dict[str, Any]) -> _Claim:
        read_part(site["part"])
        return cls(str(site["tensor"]), site["part"], parse(site["pattern"]), bool(site["transposed"]))

    def problem(self, tensor: Tensor) -> str | None:
        name = f"{self.tensor}[{self.part}]" if self.part else self.tensor
        try:
            matrix = tensor[read_part(self.part)]
        except IndexError:
            return f"{name}: no such part"
        if matrix.ndim != 2:
            return f"{name}: not a matrix"
        why = self.pattern.violation(matrix.T if self.transposed else matrix)
        return f"{name}: not {self.pattern}: {why}" if why else None


def verify(folder: str | Path) -> Verification:
    """Check a folder against its `llmprune.json`, or a packed one against its `packed.json`.

    Raises:
        InputError: the folder holds no record of a run, or no readable checkpoint.
    """
    folder = user_path(folder, "folder")
    if (folder / PACKED).is_file():
        with plain_errors():
            return _verify_packed(PackedFolder.open(folder))
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no {RECORD}: give a folder that llmprune wrote")
    record = read_json(folder / RECORD)
    if record.get("schema") != SCHEMA:
        raise InputError(f"{folder / RECORD} has schema {record.get('schema')!r}; this llmprune reads {SCHEMA}")
    try:
        files = {str(name): str(digest) for name, digest in record["files"].items()}
        sites = [_Claim.read(site) for site in record["sites"]]
    except (KeyError, TypeError, AttributeError, ValueError, InputError) as error:
        raise InputError(f"{folder / RECORD} is no record of a run: {reason(error)}") from None
    with plain_errors():
        problems = (*_file_problems(folder, files), *_site_problems(folder, sites))
    return Verification(len(files), len(sites), problems, files)


def _verify_packed(packed: PackedFolder) -> Verification:
    def damaged() -> Iterator[str]:
        for name in packed.layers:
            try:
                packed.layer(name)
            except InputError as error:
                yield str(error)

    problems = (*_file_problems(packed.folder, packed.sums, PACKED), *damaged())
    return Verification(len(packed.sums), len(packed.layers), problems, packed.sums)


def _file_problems(folder: Path, files: dict[str, str], own: str = RECORD) -> Iterator[str]:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or not path.parent.resolve().is_relative_to(folder.resolve()):
            yield f"{name}: missing"
        elif sha256(path) != expected:
            yield f"{name}: sha256 differs from the record"
    known = {".", *files, *(str(parent) for name in files for parent in PurePosixPath(name).parents)}
    for path in (path.relative_to(folder) for path in sorted(folder.rglob("*"))):
        stranger = str(path) not in known and str(path.parent) in known  # of a folder not what it holds, too
        if stranger and str(path) not in (own, RECORD, MANIFEST, *_DOWNLOADED):
            yield f"{path}: not in the record"


def _site_problems(folder: Path, claims: list[_Claim]) -> Iterator[str]:
    try:
        checkpoint = Checkpoint(folder)
    except InputError as error:
        yield str(error)
        return
    by_tensor: dict[str, list[_Claim]] = {}
    for claim in claims:
        by_tensor.setdefault(claim.tensor, []).append(claim)
    yield from (f"{name}: not in the checkpoint" for name in by_tensor if name not in checkpoint.tensors)
    for name, tensor in checkpoint.read([name for name in by_tensor if name in checkpoint.tensors]):
        yield from (problem for claim in by_tensor[name] if (problem := claim.problem(tensor)))
