"""All that a page says of a scan: error curves by kind of matrix, sensitivities over depth, and what is proposed."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

from llmprune.base.notation import from_file_name
from llmprune.base.words import count
from llmprune.job.scan import Allocation, Scan, Scanned, by_kind, total_weights
from llmprune.numerics.patterns import NM, Pattern, Unstructured
from llmprune.reports.cells import calibration_text, cell, table, text_cell
from llmprune.reports.saved_scan import SavedScan

_SHOWN = ("50%", "70%", "2:4")  # patterns of which the table of all matrices has the errors


def scan_content(saved: SavedScan) -> dict[str, Any]:
    """Of one scan."""
    scan, matrices = saved.scan, saved.scan.matrices
    dearest, cheapest = (choose(matrices, key=lambda one: one.nats) for choose in (max, min))
    found = {
        "model": scan.model["name"],
        "method": scan.method,
        "probe": scan.probe,
        "probed": f"{scan.probed:,}",
        "calibration": calibration_text(scan.calibration),
        "compute": "{dtype} on {device}".format(**scan.compute),
        "facts": [
            {"title": "Matrices", "cell": cell(len(matrices), "{:,}".format), "from": f"of {count(_blocks(scan), 'block')}"},
            {"title": "Dearest alone", "cell": cell(dearest.nats, _nats), "from": dearest.name},
            {"title": "Cheapest alone", "cell": cell(cheapest.nats, _nats), "from": cheapest.name},
            {"title": "Scanned in", "cell": cell(sum(scan.seconds.values()), "{:,.1f} s".format), "from": ""},
        ],
        "curves": _curves(matrices),
        "nats": _map(scan, lambda one: one.nats, _nats),
        "proposals": [_proposal(scan, name, own) for name, own in saved.allocations.items()],
        "matrices": _matrices(matrices),
    }
    return {"report": 1, "title": f"{scan.model['name']}, scanned", "scan": found}


def _blocks(scan: Scan) -> int:
    return len({one.block for one in scan.matrices})


def _curves(matrices: Sequence[Scanned]) -> dict[str, list[tuple[float, float]]]:
    """Of each kind the sparsities that all its matrices were measured at, and the mean error there."""
    curves = {}
    for kind, own in by_kind(matrices).items():
        each = [dict(one.curve()) for one in own]
        shared = sorted(set.intersection(*map(set, each)))
        curves[kind] = [(sparsity, sum(curve[sparsity] for curve in each) / len(each)) for sparsity in shared]
    return {kind: curve for kind, curve in curves.items() if curve}


def _map(scan: Scan, value: Callable[[Scanned], float | None], show: Callable[[float], str]) -> dict[str, Any]:
    """By kind of matrix, down, and block, across; where a block has several of a kind, the mean by weights."""
    blocks, kinds = sorted({one.block for one in scan.matrices}), by_kind(scan.matrices)
    values = [[_mean([one for one in own if one.block == block], value) for block in blocks] for own in kinds.values()]
    texts = [["" if own is None else show(own) for own in row] for row in values]
    return {"rows": list(kinds), "blocks": blocks, "values": values, "texts": texts}


def _mean(own: Sequence[Scanned], value: Callable[[Scanned], float | None]) -> float | None:
    known = [(one.weights, found) for one in own if (found := value(one)) is not None]
    return sum(weights * found for weights, found in known) / sum(weights for weights, _ in known) if known else None


def _proposal(scan: Scan, name: str, allocation: Allocation) -> dict[str, Any]:
    """What each matrix drops."""

    def dropped(one: Scanned) -> float | None:
        own = [pattern for glob, pattern in allocation.items() if fnmatch.fnmatchcase(one.name, glob) or glob == one.name]
        return _dropped(own[0]) if own else None

    whole = sum(one.weights * (dropped(one) or 0.0) for one in scan.matrices) / total_weights(scan.matrices)
    return {"title": from_file_name(name), "dropped": f"{whole:.1%}", "map": _map(scan, dropped, "{:.0%}".format)}


def _dropped(pattern: Pattern | None) -> float:
    """The share of weights."""
    if isinstance(pattern, NM):
        return 1 - pattern.n / pattern.m
    return pattern.sparsity if isinstance(pattern, Unstructured) else 0.0


def _matrices(matrices: Sequence[Scanned]) -> dict[str, Any]:
    known = [text for text in _SHOWN if all(text in one.errors for one in matrices)]
    rows = [
        [
            text_cell(one.name),
            text_cell(_shape(one)),
            cell(one.nats, _nats),
            *(cell(one.errors[text], "{:.2%}".format) for text in known),
            cell(one.outliers, "{:.2%}".format),
        ]
        for one in matrices
    ]
    return table(("matrix", "shape", "nats, alone", *(f"error at {text}" for text in known), "outliers"), rows)


def _shape(one: Scanned) -> str:
    return f"{one.rows} x {one.columns}" if one.sites == 1 else f"{one.sites} x {one.rows} x {one.columns}"


def _nats(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:,.1f}"
