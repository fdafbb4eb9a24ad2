"""What the record of a run says of the files beside it, and whether that holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmprune.errors import InputError, reason
from llmprune.models.files import read_json
from llmprune.stream.publish import RECORD, SCHEMA, sha256


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
