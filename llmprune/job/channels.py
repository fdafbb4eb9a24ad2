"""What can become of a model's channels before it is pruned, and what came of it in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.base.words import count

ROTATED, PERMUTED = "rotated", "permuted"
_KINDS = {"neurons": "neurons", "values": "channels of values", "hidden": "hidden channels"}


def channels_text(kind: str, channels: Mapping[str, Any]) -> str:
    """What rotating or permuting came to, in words, from `RunRecord.channels`."""
    costs, left = channels["costs"].items(), channels["left"]
    gains = [f"{_KINDS[own]} {cost['after'] / cost['before']:.2f}x" for own, cost in costs]
    text = f"{kind}; by second order the mask costs, of what it did before: {', '.join(gains)}" if gains else f"not {kind}"
    if left:
        what, why = next(iter(left.items()))
        text += f"; left: {what} ({why})" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
    if channels["added"]:
        text += f"; the head has a matrix of its own now: {count(channels['added'], 'parameter')} more"
    return text
