"""Re-check a folder that llmprune wrote: every file's sha256, and the pattern or the codes of every matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from llmprune.base.errors import InputError, plain_errors, reason, user_folder
from llmprune.base.files import PACKED, RECORD, differing, read_record
from llmprune.formats.packed import PackedFolder, open_checkpoint
from llmprune.formats.quantised import CodesView
from llmprune.models.checkpoint import Checkpoint, TensorInfo, read_header
from llmprune.models.sites import read_part
from llmprune.numerics.patterns import Pattern, parse
from llmprune.output.resume import MANIFEST

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
    """Check a folder against its `llmprune.json`, or a packed one against its `packed.json`. What is damaged does not keep
    the rest from being checked.

    Raises:
        InputError: there is no such folder, or it holds no record of a run, or one of another version.
    """
    folder = user_folder(folder, "folder")
    with plain_errors():
        if (folder / PACKED).is_file():
            return _verify_packed(PackedFolder.survey(folder))
        if not (folder / RECORD).is_file():
            raise InputError(f"{folder} holds no {RECORD}: give a folder that llmprune wrote")
        record, files = read_record(folder)
        try:
            sites = [_Claim.read(site) for site in record["sites"]]
            codes = {str(one["tensor"]): (one["bits"], one["group"]) for one in record.get("codes", ()) if one["coded"]}
        except (KeyError, TypeError, ValueError, InputError) as error:
            raise InputError(f"{folder / RECORD} is no record of a run: {reason(error)}") from None
        problems = (*_file_problems(folder, files), *_site_problems(folder, files, sites, codes))
        return Verification(len(files), len(sites) or len(codes), problems, files)


def _verify_packed(packed: PackedFolder) -> Verification:
    files = _file_problems(packed.folder, packed.sums, PACKED) if packed.sums else ()  # else all would be strangers
    problems = (*files, *packed.problems, *_packed_problems(packed))
    return Verification(len(packed.sums), len(packed.layers), problems, packed.sums)


def _packed_problems(packed: PackedFolder) -> Iterator[str]:
    """Of the record, and of the matrices that are there."""
    if (packed.folder / RECORD).is_file():
        try:
            read_record(packed.folder)
        except InputError as error:
            yield str(error)
    for name in packed.whole():
        try:
            packed.layer(name)
        except InputError as error:
            yield str(error)


def _file_problems(folder: Path, files: Mapping[str, str], own: str = RECORD) -> Iterator[str]:
    yield from differing(folder, files)
    known = {".", *files, *(str(parent) for name in files for parent in PurePosixPath(name).parents)}
    for path in (path.relative_to(folder) for path in sorted(folder.rglob("*"))):
        stranger = str(path) not in known and str(path.parent) in known  # of a folder not what it holds, too
        if stranger and str(path) not in (own, RECORD, MANIFEST, *_DOWNLOADED):
            yield f"{path}: not in the record"


class _Remains(Checkpoint):
    """What can be read of a broken checkpoint's `files`; `problems` says what cannot."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder, self.tensors, self.problems = folder, dict[str, TensorInfo](), list[str]()
        for file in (name for name in files if name.endswith(".safetensors") and (folder / name).is_file()):
            try:
                self.tensors |= read_header(folder, file)
            except InputError as error:
                self.problems.append(str(error))


def _code_problems(checkpoint: Checkpoint, codes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """Tensors that the record says are codes must be, of as many bits and columns a scale."""
    held = checkpoint if isinstance(checkpoint, CodesView) else None
    for name, (bits, group) in codes.items():
        found = held.group_of(name) if held and name in held.coded else None
        if held is None or found is None:
            yield f"{name}: not codes, which the record says"
        elif (held.bits, found) != (bits, group):
            yield f"{name}: {held.bits} bits in groups of {found}, {bits} in groups of {group} in the record"


def _site_problems(
    folder: Path, files: Iterable[str], claims: list[_Claim], codes: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    by_tensor: dict[str, list[_Claim]] = {}
    for claim in claims:
        by_tensor.setdefault(claim.tensor, []).append(claim)
    checkpoint: Checkpoint
    try:
        checkpoint = open_checkpoint(folder)
        yield from (f"{name}: not in the checkpoint" for name in by_tensor if name not in checkpoint.tensors)
        yield from _code_problems(checkpoint, codes)
    except InputError as error:
        checkpoint = remains = _Remains(folder, files)
        yield from dict.fromkeys([str(error), *remains.problems])
    for name, tensor in checkpoint.read([name for name in by_tensor if name in checkpoint.tensors]):
        yield from (problem for claim in by_tensor[name] if (problem := claim.problem(tensor)))
