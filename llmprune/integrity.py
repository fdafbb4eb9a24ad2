"""Re-check a folder that llmprune wrote: every file's sha256, and the pattern of every pruned matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.errors import InputError
from llmprune.models.checkpoint import Checkpoint, read_json
from llmprune.patterns import parse
from llmprune.report.record import RECORD
from llmprune.stream.shards import sha256


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
    folder = Path(folder)
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no {RECORD}: give a folder that llmprune wrote")
    record = read_json(folder / RECORD)
    files, sites = record.get("files"), record.get("sites")
    if not isinstance(files, dict) or not isinstance(sites, list) or not files or not sites:
        raise InputError(f"{folder / RECORD} lists no files or no sites: it is no record of a run")
    problems = (*_file_problems(folder, files), *_site_problems(Checkpoint(folder), sites))
    return Verification(len(files), len(sites), problems)


def _file_problems(folder: Path, files: dict[str, str]) -> Iterator[str]:
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            yield f"{name}: missing"
        elif sha256(path) != expected:
            yield f"{name}: sha256 differs from the record"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in files:
            yield f"{path.name}: not in the record"


def _site_problems(checkpoint: Checkpoint, sites: list[dict[str, Any]]) -> Iterator[str]:
    by_tensor = {str(site.get("tensor")): site for site in sites}
    missing = [name for name in by_tensor if name not in checkpoint.tensors]
    yield from (f"{name}: not in the checkpoint" for name in missing)
    for name, tensor in checkpoint.read([name for name in by_tensor if name not in missing]):
        site = by_tensor[name]
        weight = tensor.T if site.get("transposed") else tensor
        if problem := parse(str(site.get("pattern"))).violation(weight):
            yield f"{name}: not {site['pattern']}: {problem}"
