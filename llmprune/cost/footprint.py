"""All costs of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmprune.cost import disk_bytes, energy, kv_cache, macs, memory_bytes, parameters
from llmprune.cost.base import Cost, Sized

COSTS: tuple[Cost, ...] = (parameters, macs, disk_bytes, memory_bytes, kv_cache, energy)  # in the order in which they are shown


def footprint(whole: Sized) -> dict[str, int]:
    """By name, those that are known of the model."""
    measured = {cost.NAME: cost.measure(whole) for cost in COSTS}
    return {name: value for name, value in measured.items() if value is not None}


def changes(structure: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Title, before and after, of the costs in a record's `structure`: not the bytes on disk, which its `size` has from the
    files, nor those in memory where they are the same. And of the budgets in its `recipe` that pruned weights met."""
    before, after = structure.get("before", {}), structure.get("after", {})
    on_disk = before.get(disk_bytes.NAME), after.get(disk_bytes.NAME)
    for name, was in before.items():
        same = name == memory_bytes.NAME and (was, after[name]) == on_disk
        if name != disk_bytes.NAME and not same:
            yield _title(name), was, after[name]
    for title, was, now in recipe.get("allocation", {}).get("budgets", ()):
        yield title, was, now


def _title(name: str) -> str:
    return next((cost.TITLE for cost in COSTS if name == cost.NAME), name.replace("_", " "))
