"""Read records that runs left behind, and what was measured of them later, trusting nothing that they say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import msgspec

from llmprune.base.errors import InputError, user_path
from llmprune.base.files import INDEX, PACKED, RECORD, SCHEMA, SINGLE, read_json
from llmprune.base.words import count
from llmprune.job.options import PruneConfig
from llmprune.job.record import Count, Positive, RunRecord
from llmprune.numerics.patterns import parse
from llmprune.reports.schema import parts

T = TypeVar("T")
_LATER = ("recoveries", "codes", "rounding", "channels")  # in a record, which those of earlier versions lack
_WORDS = {
    "array": "a list", "object": "a mapping", "str": "text", "int": "a whole number", "float": "a finite number",
    "bool": "true or false",
}  # fmt: skip


class ModelTime(TypedDict):
    """A row of a bench about the whole model."""

    phase: str
    batch: Count
    tokens: Count
    dense: Positive
    packed: Positive


class Bench(TypedDict):
    """What `llmprune bench --json` wrote."""

    device: str
    dtype: str
    date: str
    weights: dict[str, Count]
    model: list[ModelTime]
    advice: list[str]


@dataclass(frozen=True, slots=True)
class Saved:
    """A run, read back.

    Attributes:
        label: what a page calls it.
        file: its record; `folder`: where its weights are, None if they are not beside it.
        config: its arguments; `versions` of the packages it ran with.
    """

    label: str
    file: Path
    folder: Path | None
    record: RunRecord
    config: PruneConfig
    versions: dict[str, str]
    bench: Bench | None = None


def read_runs(names: Sequence[str], benches: Sequence[str] = ()) -> list[Saved]:
    """The runs in the folders or record files called `names`, with a bench file for each of them or for none.

    Raises:
        InputError: one is no run or damaged, is named twice, or the benches are of another number.
    """
    if benches and len(benches) != len(names):
        raise InputError(
            f"{count(len(benches), 'bench file')} for {count(len(names), 'run')}: "
            "give --bench once for each run, in their order"
        )
    files = [_record_file(name) for name in names]
    places = [file.resolve() for file in files]
    if twice := [name for number, name in enumerate(names) if places[number] in places[:number]]:
        raise InputError(f"run {twice[0]} is given twice: name each once")
    found = [_read_run(file, label) for file, label in zip(files, _labels(names, places), strict=True)]
    measured = map(read_bench, benches)
    return [dataclasses.replace(run, bench=next(measured, None)) for run in found]


def _record_file(name: str) -> Path:
    path = user_path(name, "run")
    if not path.exists():
        raise InputError(f"run {name} does not exist: name a folder that llmprune wrote, or its {RECORD}")
    if path.is_dir() and not (path / RECORD).is_file():
        raise InputError(f"{name} holds no {RECORD}: name a folder that llmprune wrote")
    return path / RECORD if path.is_dir() else path


def _labels(names: Sequence[str], places: Sequence[Path]) -> list[str]:
    """The folders' names, or as the user wrote them where two are alike."""
    short = [place.parent.name if place.name == RECORD else place.stem for place in places]
    return [name if short.count(own) > 1 or not own else own for name, own in zip(names, short, strict=True)]


def _read_run(file: Path, label: str) -> Saved:
    saved = read_json(file)
    if "schema" not in saved:
        raise InputError(f"{file} is no record of a run: give a folder that llmprune wrote, or its {RECORD}")
    if saved["schema"] != SCHEMA:
        raise InputError(f"{file} has schema {saved['schema']!r:.40}; this llmprune reads {SCHEMA}")
    try:
        record = _read_record(saved)
        for pattern in dict.fromkeys(site.pattern for site in record.sites):
            parse(pattern)
        config = PruneConfig.recorded(record.arguments)
    except (Misfit, InputError) as error:
        raise InputError(f"{file} is no whole record of a run: {error}; prune again, or name another") from None
    weights = file.name == RECORD and any((file.parent / name).is_file() for name in (SINGLE, INDEX, PACKED))
    return Saved(label, file, file.parent if weights else None, record, config, saved["versions"])


def read_bench(name: str) -> Bench:
    """What `llmprune bench --json FILE` wrote.

    Raises:
        InputError: the file is something else.
    """
    path = user_path(name, "bench")
    try:
        return read_as(Bench, read_json(path))
    except Misfit as error:
        raise InputError(f"{path} is not what llmprune bench --json writes: {error}") from None


def _read_record(saved: Mapping[str, Any]) -> RunRecord:
    """A record, with what it holds as plain mappings and the ranges of its numbers checked.

    Raises:
        Misfit: something is missing, of another type or out of range.
    """
    names = ("versions", *(field.name for field in dataclasses.fields(RunRecord) if field.name not in _LATER))
    if missing := [name for name in names if name not in saved]:
        raise Misfit(f"{missing[0]} is missing")
    for name, hint in parts(saved).items():
        read_as(hint, saved[name], name)
    record = read_as(RunRecord, saved)
    for place, fits, wanted in _relations(record):
        if not fits:
            raise Misfit(f"{place} should be {wanted}")
    return record


def _relations(record: RunRecord) -> Iterator[tuple[str, bool, str]]:
    """Of numbers to one another: where, whether they are right, and what is."""
    blocks = record.model["blocks"]
    for name in ("sites", "reconstructions", "removals", "codes"):
        for number, one in enumerate(getattr(record, name)):
            yield f"{name}[{number}].block", one.block < blocks, f"0 to {blocks - 1}"
    for number, fit in enumerate(record.reconstructions):
        yield f"reconstructions[{number}].after", fit.after <= fit.before, "0 to what it was before"
    for number, gone in enumerate(record.removals):
        yield f"removals[{number}].kept", gone.kept <= gone.count, "0 to its count"
    yield "dense", (record.dense is None) == (record.pruned is None), "measured where pruned is"
    before, after = (record.structure.get(name, {}) for name in ("before", "after"))
    yield "structure", before.keys() == after.keys(), "the same sizes twice"


class Misfit(Exception):
    """A value is not what it should be; the message says where."""


def read_as(hint: type[T], value: Any, place: str = "") -> T:
    """`value`, from JSON, as the type `hint`.

    Raises:
        Misfit: it is of another type.
    """
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise Misfit(_plain(str(error), place)) from None


def _plain(error: str, place: str) -> str:
    """What msgspec says of a value in `place`, such as "Expected `int`, got `str` - at `$.name`", in a user's words."""
    said, _, path = error.partition(" - at `$")
    place = (place + path.rstrip("`")).lstrip(".")
    if missing := re.search("missing required field `(.*)`", said):
        return f"{place}.{missing[1]} is missing".lstrip(".")
    wanted = re.match("Expected `(.*?)`([^,]*)", said)
    kinds, bound = wanted.groups() if wanted else ("float", "")  # a whole number that is too large for one
    return f"{place} should be {' or '.join(_WORDS.get(kind, kind) for kind in kinds.split(' | '))}{bound}"
