"""The record of a run: everything that was asked, measured and written, as plain data (`llmprune.json`)."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from llmprune.base.files import SCHEMA

COMPUTED = "computed from tensor sizes"  # the heading of what is not measured
_PRUNING = ("forward", "statistics", "solve", "reconstruct", "write")
_PACKAGES = ("llmprune", "torch", "transformers", "safetensors", "accelerate", "datasets")

_INT, _FLOAT = 2**63 - 1, 1e300  # the largest that are read back, far from where sums overflow
Count = Annotated[int, Meta(ge=0, le=_INT)]
Size = Annotated[int, Meta(ge=1, le=_INT)]
Number = Annotated[float, Meta(ge=-_FLOAT, le=_FLOAT)]
Measure = Annotated[float, Meta(ge=0, le=_FLOAT)]
Positive = Annotated[float, Meta(gt=0, le=_FLOAT)]
Share = Annotated[float, Meta(ge=0, le=1)]


def relative(lost: float, whole: float) -> float | None:
    """What is lost of what there was; None where there was nothing."""
    return lost / whole if whole > 0 else None


def mean_known(errors: Iterable[float | None]) -> float | None:
    """The mean of those that were measured; None where none was."""
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One pruned matrix.

    Attributes:
        tensor: the name on disk of the tensor that holds it; `part`: which part of that it is, all where empty.
        shape: (out, in).
        transposed: stored as (in, out).
        sparsity: share of zeros achieved.
        error: relative squared output error on a sample of calibration tokens, given the inputs it was solved for; None where
            it puts out nothing on them, as an expert does that no token was sent to.
        tokens: calibration tokens that reached it.
        notes: what the solver recorded, such as the damping it needed; for an expert, how much of its statistics came from
            those of all experts together (`pool_share`).
    """

    name: str
    tensor: str
    part: str
    block: Count
    pattern: str
    shape: tuple[Size, Size]
    transposed: bool
    sparsity: Share
    error: Measure | None
    tokens: Count
    seconds: Measure
    notes: Mapping[str, Number]


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """The fit of one block to the dense block's output.

    Attributes:
        before: relative squared error of the block's output on held-out calibration windows; `after` is never more.
        steps: optimiser steps taken; `rate` is the highest learning rate, relative to each parameter's scale.
        nbytes: memory of the fitted copies and the optimiser's state.
    """

    block: Count
    before: Measure
    after: Measure
    steps: Count
    rate: Measure
    nbytes: Count
    seconds: Measure


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed from one block.

    Attributes:
        kind: heads, counted as the model counts those of queries, or neurons.
        site: the matrix that reads them, fitted again.
        count: how many there were; `kept` stayed.
        error: relative squared error of what it puts out, on a sample of calibration tokens; None where that is nothing.
    """

    block: Count
    kind: str
    site: str
    count: Size
    kept: Count
    error: Measure | None
    seconds: Measure


@dataclass(frozen=True, slots=True)
class CodeRecord:
    """One quantised matrix.

    Attributes:
        tensor, part, shape, transposed: as of a `SiteRecord`.
        group: columns that share a scale, of `scale_bytes`.
        coded: stored as codes; else as the weights that they stand for.
        zeros: share of codes that are 0.
        error: relative squared output error on a sample of calibration tokens, beside the weights before; None where those put
            out nothing.
    """

    name: str
    tensor: str
    part: str
    block: Count
    bits: Size
    group: Size
    scale_bytes: Size
    shape: tuple[Size, Size]
    transposed: bool
    coded: bool
    zeros: Share
    error: Measure | None
    seconds: Measure


@dataclass(slots=True)
class RunRecord:
    """A whole run. Seconds, memory and perplexities are measured in it, sizes computed; `None` stands for what was not.

    `size` counts the nonzero weights of the pruned matrices, and the bytes of all tensors, before and after. `recipe` is
    what the arguments came to: method, refit, target, reconstruction. `structure` says what was removed and what that made
    smaller, before and after. `predicted` is what the preflight expected. `peak_memory` is that
    of the whole run, in bytes, `phase_memory` each phase's. `recoveries` are what training afterwards did, in order; `codes`
    the matrices that were quantised in the end, and `rounding` how, where that was a command of its own. `channels` has, for
    those that were rotated and permuted, what masks cost by second order before and after, what was left as it was, and
    how many parameters were added.
    """

    arguments: dict[str, Any]
    recipe: dict[str, Any]
    model: dict[str, Any]
    calibration: dict[str, Any]
    compute: dict[str, Any]
    predicted: dict[str, Any] = field(default_factory=dict)
    sites: list[SiteRecord] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    structure: dict[str, Any] = field(default_factory=dict)
    removals: list[Removal] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    dense: Perplexity | None = None
    pruned: Perplexity | None = None
    seconds: dict[str, Measure] = field(default_factory=dict)
    peak_memory: dict[str, Count] = field(default_factory=dict)
    phase_memory: dict[str, dict[str, Count]] = field(default_factory=dict)
    size: dict[str, Count] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    codes: list[CodeRecord] = field(default_factory=list)
    rounding: dict[str, Any] = field(default_factory=dict)
    channels: dict[str, dict[str, Any]] = field(default_factory=dict)

    def weights(self) -> int:
        """Weights in the pruned matrices."""
        return sum(site.shape[0] * site.shape[1] for site in self.sites)

    def zeros(self) -> int:
        return sum(round(site.sparsity * site.shape[0] * site.shape[1]) for site in self.sites)

    def code_bits(self) -> float:
        """Bits that a quantised weight takes, its share of the scales counted, of the matrices that are stored as codes."""
        held = [one for one in self.codes if one.coded]
        weights = sum(one.shape[0] * one.shape[1] for one in held)
        return sum(one.shape[0] * one.shape[1] * (one.bits + 8 * one.scale_bytes / one.group) for one in held) / max(weights, 1)

    def output_error(self) -> float | None:
        """The mean of the matrices'."""
        return mean_known(site.error for site in self.sites)

    def rounding_error(self) -> float | None:
        """The mean of the quantised matrices'."""
        return mean_known(one.error for one in self.codes)

    def pruning_seconds(self) -> float:
        """Seconds of forwards, statistics, solving, reconstruction and writing; not of reading texts or evaluating."""
        return sum(self.seconds.get(phase, 0.0) for phase in _PRUNING)

    def overhead(self) -> float | None:
        """`pruning_seconds` as a multiple of those of the forwards."""
        forwards = self.seconds.get("forward")
        return self.pruning_seconds() / forwards if forwards else None

    def follow(self, earlier: RunRecord) -> None:
        """Let the record start where `earlier`, of the step before, did. Quantising leaves what was pruned as it is."""
        dense, asked = self.dense, self.arguments
        self.dense, self.removals, self.structure = earlier.dense or dense, earlier.removals, earlier.structure
        self.channels = earlier.channels | self.channels
        self.arguments, self.model = earlier.arguments, earlier.model
        self.size["bytes_before"] = earlier.size["bytes_before"]
        if not self.codes:
            self.recipe["text"] = earlier.recipe["text"]
            return
        if dense and self.pruned:
            self.rounding |= {"before": dataclasses.asdict(dense), "after": dataclasses.asdict(self.pruned)}
        if not (dense and earlier.pruned and dense.comparable(earlier.pruned)):
            self.dense = self.pruned = None
        if not earlier.arguments.get("bits"):
            self.rounding["arguments"] = asked
        self.recipe, self.sites, self.reconstructions = earlier.recipe, earlier.sites, earlier.reconstructions
        self.skipped, self.recoveries = earlier.skipped, earlier.recoveries
        self.size |= {name: number for name, number in earlier.size.items() if name.startswith("nonzero")}

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> RunRecord:
        """What `as_dict` made of a step on the way: as it is, for a perplexity may have been infinite."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in saved.items() if name in names}
        for name in ("dense", "pruned"):
            values[name] = Perplexity(**values[name]) if values[name] else None
        values["sites"] = [SiteRecord(**one | {"shape": tuple(one["shape"])}) for one in values["sites"]]
        values["reconstructions"] = [Reconstruction(**one) for one in values["reconstructions"]]
        values["removals"] = [Removal(**one) for one in values["removals"]]
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "versions": versions(), **dataclasses.asdict(self)}


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a result."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            continue
    return found


PERPLEXITY_OF = "token perplexity of "  # a text: what such a number is called


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean loss over `tokens` predicted tokens, in `windows` windows of `length` tokens of `text`.

    Attributes:
        dtype: the model computed in, such as `bfloat16`; empty in records of earlier versions.
    """

    value: Positive
    text: str
    tokens: Count
    windows: Count
    length: Count
    dtype: str = ""

    def comparable(self, other: Perplexity) -> bool:
        """Whether it is of the same windows of a text."""
        return (self.text, self.tokens, self.windows, self.length) == (other.text, other.tokens, other.windows, other.length)

    def computed(self) -> str:
        """The dtype, as it follows the windows where those are named."""
        return f", {self.dtype}" if self.dtype else ""


def excess_loss(dense: Perplexity, pruned: Perplexity) -> float:
    """ln(pruned / dense): nats a token that pruning cost; comparable across models and texts."""
    return math.log(pruned.value / dense.value)
