"""What of a record others may see: all of it, but of a path on this machine its last name only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Set
from pathlib import PurePath
from typing import Any

from llmprune.data.documents import names_a_file
from llmprune.job.record import PERPLEXITY_OF, Perplexity, RunRecord

_FOLDERS = ("model", "output", "baseline", "teacher", "rewind")
_TEXTS = ("calibration", "eval_text", "text", "name", "names")
_HUB_IDS = ("hub_id", "baseline_hub_id", "teacher_hub_id", "rewind_hub_id")


def public(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A record, as it was read from its file, without local paths."""
    hub_ids = set(_hub_ids(saved))
    return {name: _cut(value, name, hub_ids) for name, value in saved.items()}


def public_run(record: RunRecord) -> RunRecord:
    """A record without local paths."""
    hub_ids = {*_hub_ids(record.model), *_hub_ids(record.recoveries)}
    names = ("arguments", "calibration", "dense", "pruned", "recoveries", "rounding")
    return dataclasses.replace(record, **{name: _cut(getattr(record, name), name, hub_ids) for name in names})


def _hub_ids(value: Any) -> Iterator[str]:
    """Those that a record names as such; all other models are folders here, or bundled."""
    for name, own in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if name in _HUB_IDS and isinstance(own, str):
            yield own
        yield from _hub_ids(own)


def _cut(value: Any, name: str, hub_ids: Set[str]) -> Any:
    """What goes by `name`, with each local path in it cut to its last name."""
    if isinstance(value, dict):
        return {own: _cut(inner, own, hub_ids) for own, inner in value.items()}
    if isinstance(value, list):
        return [_cut(inner, name, hub_ids) for inner in value]
    if isinstance(value, Perplexity):
        return dataclasses.replace(value, text=_cut(value.text, "text", hub_ids))
    if not isinstance(value, str):
        return value
    text = value.removeprefix(PERPLEXITY_OF)
    folder = name in _FOLDERS and value.partition("@")[0] not in hub_ids
    local = folder or (name in _TEXTS and names_a_file(text))
    return value.removesuffix(text) + (PurePath(text).name or text) if local else value
