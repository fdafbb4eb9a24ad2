"""What a scan of a dense model has measured: of each matrix, what it loses at which sparsity, and what that is worth."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from llmprune.base.errors import InputError
from llmprune.base.files import SCHEMA, read_json
from llmprune.job.record import Count, Measure, Share, Size, versions
from llmprune.numerics.patterns import Pattern, Unstructured, parse

_LEAST = 1e-12  # relative error; below it is rounding


@dataclass(frozen=True, slots=True)
class Scanned:
    """A matrix, or all matrices of one kind of a layer's experts, which get one pattern.

    Attributes:
        name: the site's, with * for the number of an expert.
        kind: its last part, such as `down_proj`.
        sites: how many there are; each is (rows, columns).
        errors: by pattern, what pruning to it loses of the output, squared and relative, on the calibration tokens.
        nats: KL divergence from the dense model, a token, of the model that has only this pruned, to the scan's `probe`.
        outliers: share of |W| times the inputs' root mean square that is above five times its mean over the block (Yin et
            al., "OWL", 2024).
    """

    name: str
    block: Count
    kind: str
    sites: Size
    rows: Size
    columns: Size
    errors: dict[str, Measure]
    nats: Measure
    outliers: Share

    @property
    def weights(self) -> int:
        return self.sites * self.rows * self.columns

    def error(self, pattern: Pattern) -> float:
        """Relative squared output error at `pattern`: measured, or between two measured sparsities, log-linear; beyond them as
        between the last two.

        Raises:
            InputError: it was not measured.
        """
        if (known := self.errors.get(str(pattern))) is not None:
            return known
        curve = self.curve()
        if not isinstance(pattern, Unstructured) or len(curve) < 2:
            raise InputError(f"the scan has not measured {self.name} at {pattern}: scan it anew")
        wanted, last = pattern.sparsity, len(curve) - 2
        i = next((i for i in range(last) if wanted <= curve[i + 1][0]), last)
        (low, first), (high, second) = curve[i], curve[i + 1]
        a, b = (math.log(max(error, _LEAST)) for error in (first, second))
        return math.exp(a + (b - a) * (wanted - low) / (high - low))

    def curve(self) -> list[tuple[float, float]]:
        """Sparsity and error of those of `errors` that are unstructured, ascending."""
        found = [(parse(text), error) for text, error in self.errors.items()]
        return sorted((pattern.sparsity, error) for pattern, error in found if isinstance(pattern, Unstructured))


@dataclass(frozen=True, slots=True)
class Scan:
    """Of a whole model.

    Attributes:
        model: its name, and the fingerprint of its checkpoint; `calibration` and `compute` as in the record of a run.
        method: the solver whose errors these are.
        probe: the pattern at which `Scanned.nats` were measured, on `probed` tokens.
        seconds: that it took, by phase.
    """

    model: dict[str, Any]
    calibration: dict[str, Any]
    compute: dict[str, Any]
    method: str
    probe: str
    probed: Count
    matrices: list[Scanned]
    seconds: dict[str, Measure]

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "versions": versions(), **asdict(self)}

    def digest(self) -> str:
        """Of all that was measured."""
        return hashlib.sha256(json.dumps([asdict(one) for one in self.matrices]).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, path: Path) -> Scan:
        """What `llmprune scan` wrote.

        Raises:
            InputError: it is something else, or damaged.
        """
        saved = read_json(path)
        if "schema" not in saved or "matrices" not in saved:
            raise InputError(f"{path} is no scan: give the scan.json that llmprune scan wrote")
        try:
            return msgspec.convert(saved, cls)
        except msgspec.ValidationError as error:
            raise InputError(f"{path} is no whole scan: {error}") from None


def loss(one: Scanned, probe: str, pattern: Pattern | None) -> float:
    """Nats a token that pruning `one` to `pattern` is reckoned to lose: as many times what it lost at `probe` as its error is
    that at `probe`. None is dense, and loses nothing."""
    if pattern is None:
        return 0.0
    return one.nats * one.error(pattern) / max(one.errors[probe], _LEAST)


def by_kind(matrices: Sequence[Scanned]) -> dict[str, list[Scanned]]:
    """Those of one kind together, in their order."""
    kinds: dict[str, list[Scanned]] = {}
    for one in matrices:
        kinds.setdefault(one.kind, []).append(one)
    return kinds


def total_weights(matrices: Sequence[Scanned]) -> int:
    return sum(one.weights for one in matrices)


Allocation = Mapping[str, "Pattern | None"]  # by `Scanned.name`; None: it stays dense
