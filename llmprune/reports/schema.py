"""What the parts of a record look like, for who reads one that may say anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from llmprune.job.record import Count, Measure, Positive, Reconstruction, Size

_Blocks = Annotated[int, Meta(ge=1, le=10_000)]
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]

ModelFacts = TypedDict(
    "ModelFacts",
    {"name": str, "hub_id": "str | None", "commit": "str | None", "class": str, "parameters": Count, "blocks": _Blocks},
)


class _Told(TypedDict):
    text: str


class _Spread(_Told, total=False):
    budgets: list[tuple[str, Count, Count]]


class _Named(_Told):
    name: str


class _Recipe(_Named, total=False):
    allocation: _Spread  # where the sparsity was not uniform


class CalibrationFacts(TypedDict):
    text: str
    samples: Count
    seqlen: Count
    tokens: Count
    seed: _Seed


class ComputeFacts(TypedDict):
    device: str
    dtype: str
    processes: Count


class _Compute(ComputeFacts, total=False):
    why: str  # records of earlier versions lack it


class _Asked(TypedDict):
    loss: str
    train: str


class _Trained(TypedDict):
    arguments: _Asked
    teacher: str | None
    text: str
    tokens: Count
    steps: Count
    loss_before: Measure
    loss_after: Measure
    seconds: Measure


class _Recovered(_Trained, total=False):
    best: Count  # of a whole model
    held_out: list[tuple[Count, Measure]]
    trained: list[tuple[Count, Measure]]
    blocks: list[Reconstruction]


class _Size(TypedDict):
    bytes_before: Count
    bytes_after: Count


class _Weights(_Size):
    nonzero_before: Count
    nonzero_after: Count


class _Speed(TypedDict):
    use: str
    asked: Positive
    predicted: Positive
    dense_ms: Positive | None
    smaller_ms: Positive | None
    device: str
    threads: Size
    dtype: str


class _Structure(TypedDict):
    removed_layers: list[Count]
    architecture: str
    before: dict[str, Count]
    after: dict[str, Count]


class _Timed(_Structure, total=False):
    speed: _Speed


class _Cost(TypedDict):
    before: Positive
    after: Measure


class _Channels(TypedDict):
    costs: dict[Literal["neurons", "values", "hidden"], _Cost]
    left: dict[str, str]
    added: Count


class _Expected(TypedDict):
    activations: Count
    weights: Count
    solving: Count


def parts(saved: Mapping[str, Any]) -> dict[str, Any]:
    """By name, what the parts of a record are to be like that are there."""
    filled: dict[str, Any] = {
        "structure": _Timed, "predicted": _Expected, "recoveries": list[_Recovered],
        "channels": dict[Literal["rotated", "permuted"], _Channels],
    }  # fmt: skip
    return {
        "model": ModelFacts,
        "recipe": _Recipe,
        "calibration": CalibrationFacts,
        "compute": _Compute,
        "size": _Weights if saved["sites"] else _Size,
        "versions": dict[str, str],
        **{name: hint for name, hint in filled.items() if saved.get(name)},
    }
