"""What a record's `structure` says of a speed that was asked for, where people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def speedup(speed: Mapping[str, Any]) -> float | None:
    """How many times as fast as the dense model the smaller one was measured to be; None where it was not."""
    return speed["dense_ms"] / speed["smaller_ms"] if speed["smaller_ms"] else None


def speed_rows(structure: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Title, before and after; nothing where no speed was asked for."""
    speed = structure.get("speed")
    if not speed:
        return
    found = speedup(speed)
    if found is not None:
        yield f"milliseconds: {speed['use']}", f"{speed['dense_ms']:.2f}", f"{speed['smaller_ms']:.2f}"
    said = f"asked {speed['asked']:g}x, predicted {speed['predicted']:.2f}x"
    yield f"speed-up ({said})", "", "not measured" if found is None else f"{found:.2f}x"
