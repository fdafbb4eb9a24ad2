"""Read records that runs left behind, and what was measured of them later, trusting nothing that they say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from llmprune.base.errors import InputError, user_path
from llmprune.base.files import INDEX, PACKED, RECORD, SCHEMA, SINGLE, read_json
from llmprune.base.words import count
from llmprune.job.options import PruneConfig
from llmprune.job.record import RunRecord
from llmprune.numerics.patterns import parse

_BLOCKS, _LARGEST = 10_000, 1e300
_WORDS = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false", type(None): "null"}

_Model = TypedDict(
    "_Model", {"name": str, "hub_id": "str | None", "commit": "str | None", "class": str, "parameters": int, "blocks": int}
)


class _Recipe(TypedDict):
    name: str
    text: str


class _Calibration(TypedDict):
    text: str
    samples: int
    seqlen: int
    tokens: int
    seed: int


class _Compute(TypedDict):
    device: str
    dtype: str
    processes: int


class _Size(TypedDict):
    bytes_before: int
    bytes_after: int


class _Weights(_Size):
    nonzero_before: int
    nonzero_after: int


class _Structure(TypedDict):
    removed_layers: list[int]
    architecture: str
    before: dict[str, int]
    after: dict[str, int]


class _Expected(TypedDict):
    activations: int
    weights: int
    solving: int


class ModelTime(TypedDict):
    """A row of a bench about the whole model."""

    phase: str
    batch: int
    tokens: int
    dense: float
    packed: float


class Bench(TypedDict):
    """What `llmprune bench --json` wrote."""

    device: str
    dtype: str
    date: str
    weights: dict[str, int]
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
        record: RunRecord = _read(RunRecord, saved, "")
        versions = _read(dict[str, str], _member(saved, "versions", ""), "versions")
        _read_parts(record)
        for pattern in dict.fromkeys(site.pattern for site in record.sites):
            parse(pattern)
        known = {field.name for field in dataclasses.fields(PruneConfig)}
        config = PruneConfig.create({name: value for name, value in record.arguments.items() if name in known})
    except (_Misfit, InputError) as error:
        raise InputError(f"{file} is no whole record of a run: {error}; prune again, or name another") from None
    weights = file.name == RECORD and any((file.parent / name).is_file() for name in (SINGLE, INDEX, PACKED))
    return Saved(label, file, file.parent if weights else None, record, config, versions)


def read_bench(name: str) -> Bench:
    """What `llmprune bench --json FILE` wrote.

    Raises:
        InputError: the file is something else.
    """
    path = user_path(name, "bench")
    try:
        bench: Bench = _read(Bench, read_json(path), "")
        for number, one in enumerate(bench["model"]):
            _require(min(one["dense"], one["packed"]) > 0, f"model[{number}]", "times above 0")
    except _Misfit as error:
        raise InputError(f"{path} is not what llmprune bench --json writes: {error}") from None
    return bench


def _read_parts(record: RunRecord) -> None:
    """Check what a record holds as plain mappings, and the ranges of numbers."""
    parts = {"model": _Model, "recipe": _Recipe, "calibration": _Calibration, "compute": _Compute}
    parts["size"] = _Weights if record.sites else _Size
    parts |= {name: hint for name, hint in (("structure", _Structure), ("predicted", _Expected)) if getattr(record, name)}
    for name, hint in parts.items():
        _read(hint, getattr(record, name), name)
    if record.structure:
        _require(record.structure["before"].keys() == record.structure["after"].keys(), "structure", "the same sizes twice")
    for place, fits, wanted in _ranges(record):
        _require(fits, place, wanted)


def _ranges(record: RunRecord) -> Iterator[tuple[str, bool, str]]:
    blocks = record.model["blocks"]
    yield "model.blocks", 0 < blocks <= _BLOCKS, f"1 to {_BLOCKS}"
    for number, site in enumerate(record.sites):
        yield f"sites[{number}].block", 0 <= site.block < blocks, f"0 to {blocks - 1}"
        yield f"sites[{number}].shape", min(site.shape) > 0, "two sizes above 0"
        yield f"sites[{number}].sparsity", 0 <= site.sparsity <= 1, "0 to 1"
        yield f"sites[{number}].error", site.error is None or site.error >= 0, "0 or more"
    for number, fit in enumerate(record.reconstructions):
        yield f"reconstructions[{number}].block", 0 <= fit.block < blocks, f"0 to {blocks - 1}"
        yield f"reconstructions[{number}].after", 0 <= fit.after <= fit.before, "0 to what it was before"
    for number, gone in enumerate(record.removals):
        yield f"removals[{number}].block", 0 <= gone.block < blocks, f"0 to {blocks - 1}"
        yield f"removals[{number}].kept", 0 <= gone.kept <= gone.count != 0, "0 to its count"
        yield f"removals[{number}].error", gone.error is None or gone.error >= 0, "0 or more"
    for name in ("dense", "pruned"):
        measured = getattr(record, name)
        yield f"{name}.value", measured is None or measured.value > 0, "more than 0"
    yield "dense", (record.dense is None) == (record.pruned is None), "measured where pruned is"
    yield "seconds", min(record.seconds.values(), default=0.0) >= 0, "0 or more"
    held = [peak for phase in record.phase_memory.values() for peak in phase.values()]
    yield "phase_memory", min(held, default=0) >= 0, "0 or more"


class _Misfit(Exception):
    """A value is not what it should be; the message says where."""


def _require(fits: bool, place: str, wanted: str) -> None:
    if not fits:
        raise _Misfit(f"{place} should be {wanted}")


def _member(value: Any, name: str, place: str) -> Any:
    if name not in value:
        raise _Misfit(f"{place}.{name} is missing".lstrip("."))
    return value[name]


def _read(hint: Any, value: Any, place: str) -> Any:
    """`value`, from JSON, as the type `hint`.

    Raises:
        _Misfit: it is of another type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None else _read(inner[0], value, place)
    if hint in _WORDS:
        return _plain(hint, value, place)
    if origin in (list, tuple):
        return _sequence(origin, inner, value, place)
    _require(isinstance(value, dict), place or "it", "a mapping")
    if origin in (dict, Mapping):
        return {name: _read(inner[1], own, f"{place}.{name}") for name, own in value.items()}
    hints = get_type_hints(hint)
    fields = {name: _read(own, _member(value, name, place), f"{place}.{name}".lstrip(".")) for name, own in hints.items()}
    return fields if is_typeddict(hint) else hint(**fields)


def _plain(hint: type, value: Any, place: str) -> Any:
    kinds = (int, float) if hint is float else (hint,)
    fits = isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
    if fits and hint in (int, float):
        fits = abs(value) < (2**63 if hint is int else _LARGEST) and math.isfinite(value)
    _require(fits, place[:80], _WORDS[hint])
    return float(value) if hint is float else value


def _sequence(kind: type, inner: tuple[Any, ...], value: Any, place: str) -> Any:
    _require(isinstance(value, list), place, "a list")
    wanted = inner * len(value) if kind is list else inner
    _require(len(value) == len(wanted), place, count(len(wanted), "value"))
    return kind(_read(own, one, f"{place}[{number}]") for number, (own, one) in enumerate(zip(wanted, value, strict=True)))
