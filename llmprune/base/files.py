"""Files: what those of a model's folder are called; JSON, sums, and files that are written whole. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmprune.base.errors import InputError, reason, user_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = "packed.json"  # what a folder of packed 2:4 matrices holds instead
SCAN = "scan.json"  # what `llmprune scan` measured
RECORD, SCHEMA = "llmprune.json", 1  # of a run: its file, and which form that has


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: it cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {reason(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def write_whole(texts: dict[Path, str]) -> None:
    """Write files, each whole or not at all."""
    partials = {path: path.resolve().parent / f".{path.name}.{os.getpid()}.partial" for path in texts}
    try:
        for path, text in texts.items():
            partials[path].write_bytes(text.encode("utf-8", "backslashreplace"))
        for path, partial in partials.items():
            partial.replace(path.resolve())
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    path.write_bytes(as_json(value))


def as_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def sums(folder: Path, *but: str) -> dict[str, str]:
    """sha256 of every file in a folder and in those inside it, but for some; by the path from the folder, with slashes."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: sha256(path) for name, path in names.items() if name not in but}


def fsync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The record in a folder, and the sha256 that it has of every other file.

    Raises:
        InputError: it is no record of a run, or of another schema.
    """
    path = folder / RECORD
    record = read_json(path)
    if record.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {record.get('schema')!r}; this llmprune reads {SCHEMA}")
    try:
        return record, {str(name): str(digest) for name, digest in record["files"].items()}
    except (KeyError, AttributeError) as error:
        raise InputError(f"{path} is no record of a run: {reason(error)}") from None


def differing(folder: Path, sums: Mapping[str, str]) -> Iterator[str]:
    """Files that are not there, or not what their sums say, and why."""
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file() or not path.parent.resolve().is_relative_to(folder.resolve()):
            yield f"{name}: missing"
            continue
        try:
            found = sha256(path)
        except OSError as error:
            yield f"{name}: cannot be read: {error.strerror}"
        else:
            if found != expected:
                yield f"{name}: sha256 differs from the record"


def check_record(folder: Path, act: str, suffix: str = "") -> None:
    """A record, where there is one, must fit the folder's files, or those whose names end so.

    Args:
        act: what is to be done with the folder, as an order.

    Raises:
        InputError: it does not.
    """
    if not (folder / RECORD).is_file():
        return
    remedy = f"get the folder again, or remove its {RECORD} to {act} without"
    try:
        _, sums = read_record(folder)
    except InputError as error:
        raise InputError(f"{error}: {remedy}") from None
    if problem := next(differing(folder, {name: own for name, own in sums.items() if name.endswith(suffix)}), None):
        raise InputError(f"{folder} is not what its {RECORD} says ({problem}): {remedy}")


def file_to_write(text: str) -> Path:
    """A file that an option names, checked before the work that would fill it.

    Raises:
        InputError: it cannot be written.
    """
    path = user_path(text, "file")
    if not path.resolve().parent.is_dir():
        raise InputError(f"cannot write {text}: its folder does not exist")
    if path.is_dir():
        raise InputError(f"cannot write {text}: it is a folder")
    if any((path.resolve().parent / name).is_file() for name in ("config.json", RECORD)):
        raise InputError(f"cannot write {text}: a model lies in its folder, which stays as it is; choose another")
    return path
