"""Read what `llmprune scan` left behind, trusting nothing that it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmprune.base.errors import InputError, user_path
from llmprune.base.files import SCAN
from llmprune.job.allocation import read_allocation
from llmprune.job.scan import Allocation, Scan
from llmprune.numerics.patterns import parse
from llmprune.reports.saved import Misfit, read_as
from llmprune.reports.schema import CalibrationFacts, ComputeFacts, ModelFacts


@dataclass(frozen=True, slots=True)
class SavedScan:
    """`allocations`: what it proposes, by the name of the file."""

    file: Path
    scan: Scan
    allocations: dict[str, Allocation]


def is_scan(name: str) -> bool:
    """Whether `name` is a folder that a scan wrote, or its scan.json."""
    path = user_path(name, "run")
    return path.name == SCAN or (path / SCAN).is_file()


def read_scan(name: str) -> SavedScan:
    """What `llmprune scan` wrote.

    Raises:
        InputError: it is damaged.
    """
    path = user_path(name, "run")
    file = path if path.name == SCAN else path / SCAN
    scan = Scan.load(file)
    try:
        for part, hint in (("model", ModelFacts), ("calibration", CalibrationFacts), ("compute", ComputeFacts)):
            read_as(hint, getattr(scan, part), part)
        for place, fits, wanted in _relations(scan):
            if not fits:
                raise Misfit(f"{place} should be {wanted}")
        parse(scan.probe)
    except (Misfit, InputError) as error:
        raise InputError(f"{file} is no whole scan: {error}; scan again, or name another") from None
    files = sorted(file.parent.glob("allocation-*.json"))
    return SavedScan(file, scan, {one.stem.removeprefix("allocation-"): read_allocation(one) for one in files})


def _relations(scan: Scan) -> Iterator[tuple[str, bool, str]]:
    """Of numbers to one another: where, whether they are right, and what is."""
    yield "matrices", bool(scan.matrices), "at least one"
    for number, one in enumerate(scan.matrices):
        yield f"matrices[{number}].block", one.block < scan.model["blocks"], "one of the model's"
        yield f"matrices[{number}].errors", scan.probe in one.errors, f"measured at {scan.probe}, too"
        for text in one.errors:
            parse(text)
