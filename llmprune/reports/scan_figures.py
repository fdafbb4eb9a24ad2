"""The figures of a scan's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.reports.figures import LINES, SERIES, drawing, heat, label, own_names


def scan_figures(scan: dict[str, Any]) -> dict[str, str]:
    """SVG by name: `curves`, `nats`, and `proposal0`, ... of each proposal."""
    found = {"curves": curves(scan["curves"]), "nats": heat(scan["nats"], share=False)}
    found |= {f"proposal{number}": heat(one["map"], share=True) for number, one in enumerate(scan["proposals"])}
    return {name: own_names(svg, name) for name, svg in found.items() if svg}


def curves(by_kind: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Mean output error over sparsity, a line a kind of matrix, on a logarithmic scale."""
    if not any(error > 0 for curve in by_kind.values() for _, error in curve):
        return ""
    with drawing(3.0) as (axes, finished):
        for number, (kind, curve) in enumerate(by_kind.items()):
            shown = [(100 * sparsity, 100 * error) for sparsity, error in curve if error > 0]
            line, color = LINES[number // len(SERIES) % len(LINES)], SERIES[number % len(SERIES)]
            axes.plot(*zip(*shown, strict=True), line, color=color, marker="o", markersize=3, label=label(kind))
        axes.set(xlabel="sparsity, %", ylabel="output error, %", yscale="log")
        axes.grid(axis="y")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=7.5, loc="upper left")
    return finished()
