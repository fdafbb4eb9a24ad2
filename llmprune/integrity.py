"""Re-check a folder that llmprune wrote: every file's sha256, and the pattern of every pruned matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmprune.errors import InputError, plain_errors, reason, user_path
from llmprune.models.checkpoint import Checkpoint, read_json
from llmprune.patterns import Pattern, parse
from llmprune.report.record import SCHEMA
from llmprune.stream.publish import RECORD, sha256


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found; `problems` is empty when all holds."""

    files: int
    matrices: int
    problems: tuple[str, ...]


def verify(folder: str | Path) -> Verification:
    """Check a folder against its `llmprune.json`.

    Raises:
        InputError: the folder holds no record of a run, or no readable checkpoint.
    """
    folder = user_path(folder, "folder")
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no {RECORD}: give a folder that llmprune wrote")
    record = read_json(folder / RECORD)
    if record.get("schema") != SCHEMA:
        raise InputError(f"{folder / RECORD} has schema {record.get('schema')!r}; this llmprune reads {SCHEMA}")
    try:
        files = {str(name): str(digest) for name, digest in record["files"].items()}
        sites = [(str(site["tensor"]), parse(site["pattern"]), bool(site["transposed"])) for site in record["sites"]]
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{folder / RECORD} is no record of a run: {reason(error)}") from None
    with plain_errors():
        problems = (*_file_problems(folder, files), *_site_problems(folder, sites))
    return Verification(len(files), len(sites), problems)


def _file_problems(folder: Path, files: dict[str, str]) -> Iterator[str]:
    for name, expected in files.items():
        if Path(name).name != name or not (folder / name).is_file():
            yield f"{name}: missing"
        elif sha256(folder / name) != expected:
            yield f"{name}: sha256 differs from the record"
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.name != RECORD:
            yield f"{path.name}: not in the record"


def _site_problems(folder: Path, sites: list[tuple[str, Pattern, bool]]) -> Iterator[str]:
    try:
        checkpoint = Checkpoint(folder)
    except InputError as error:
        yield str(error)
        return
    expected = {tensor: (pattern, transposed) for tensor, pattern, transposed in sites}
    yield from (f"{name}: not in the checkpoint" for name in expected if name not in checkpoint.tensors)
    for name, tensor in checkpoint.read([name for name in expected if name in checkpoint.tensors]):
        pattern, transposed = expected[name]
        if tensor.ndim != 2:
            yield f"{name}: not a matrix"
        elif problem := pattern.violation(tensor.T if transposed else tensor):
            yield f"{name}: not {pattern}: {problem}"
