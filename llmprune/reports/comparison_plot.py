"""A comparison of methods, as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from llmprune.job.recipes import QUALITIES
from llmprune.reports.comparison import Cells, Own, by_model, dense_perplexity, priced
from llmprune.reports.style import style

Box: TypeAlias = tuple[float, float, float, float]  # left, low, right, high, in points
INK, ACCENT = "#808080", "#d9730d"  # readable on light and dark pages
_LETTER, _LINE = 5.2, 9.5  # points that a letter is wide, and high
_SIDES = ((5, 4, False), (-5, 4, True), (7, -3, False), (-7, -3, True), (4, -13, False), (-4, -13, True))  # from a dot; right?


def plot(cells: Cells, file: Path) -> bool:
    """Two panels a model: perplexity against sparsity, excess loss against seconds. False: matplotlib is not installed."""
    models = by_model(cells)

    def fill(panels: Any) -> None:
        for (left, right), (model, own) in zip(panels, models.items(), strict=True):
            _plot_perplexity(left, own)
            _plot_cost(right, own)
            left.set_title(f"{model}: held-out perplexity")
            right.set_title(f"{model}: what {priced(own)} costs")
        for panel in panels.flat:
            _few_ticks(panel)

    return draw(file, (len(models), 2), (9.2, 3.4 * len(models)), fill)


def draw(file: Path, panels: tuple[int, int], inches: tuple[float, float], fill: Callable[[Any], None]) -> bool:
    """A figure of so many panels (rows, columns), which `fill` is given. False: matplotlib is not installed."""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError:
        return False
    with matplotlib.style.context(["default", style(INK, INK)], after_reset=True):
        figure = Figure(figsize=inches, layout="constrained")
        fill(figure.subplots(*panels, squeeze=False))
        figure.savefig(file, metadata={"Date": None})
    return True


def _plot_perplexity(panel: Any, own: Own) -> None:
    """A line a method over unstructured sparsities; N:M patterns are dots at theirs."""
    dense = dense_perplexity(own)
    panel.axhline(dense, color=INK, linestyle=":", linewidth=1)
    panel.annotate("dense", (0, dense), (2, -10), xycoords=("axes fraction", "data"), textcoords="offset points", color=INK)
    ends: list[tuple[float, float, str, str]] = []
    for method in dict.fromkeys(method for method, _ in own):
        points = sorted((_share(p), draws.mean("perplexity"), ":" in p) for (m, p), draws in own.items() if m == method)
        color = ACCENT if method in QUALITIES else INK
        line = [(x, y) for x, y, fixed in points if not fixed]
        dots = [(x, y) for x, y, fixed in points if fixed]
        if line:
            panel.plot(*zip(*line, strict=True), "-", color=color, linewidth=1)
        if dots:
            panel.plot(*zip(*dots, strict=True), "o", color=color, markersize=3)
        ends.append((*(line or dots)[-1], method, color))
    panel.set(yscale="log", xlabel="sparsity (dots: N:M)", ylabel="perplexity")
    panel.margins(x=0.25)
    panel.xaxis.set_major_formatter("{x:.0%}")
    _name_ends(panel, ends)


def _name_ends(panel: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each line at its end, none over another."""
    lowest = -math.inf
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        at = _points(panel, (x, y))[1]
        lowest = max(at, lowest + _LINE)
        panel.annotate(name, (x, y), (4, lowest - at - 3), textcoords="offset points", color=color)


def _points(panel: Any, xy: tuple[float, float]) -> Any:
    """Where that is in the figure."""
    return panel.transData.transform(xy) * 72 / panel.figure.dpi


def _share(pattern: str) -> float:
    """The fraction of zeros that a pattern asks for."""
    kept, _, of = pattern.partition(":")
    return 1 - int(kept) / int(of) if of else float(pattern.rstrip("%")) / 100


def _plot_cost(panel: Any, own: Own) -> None:
    """Excess loss against seconds of pruning; the presets in colour."""
    pattern = priced(own)
    found = {m: (draws.mean("seconds"), draws.mean("excess_loss")) for (m, p), draws in own.items() if p == pattern}
    at = {method: cost for method, cost in found.items() if cost[1] > 0}
    presets = [at[name] for name in QUALITIES if name in at]
    others = [xy for name, xy in at.items() if name not in QUALITIES]
    for points, marks, color in ((presets, "o-", ACCENT), (others, "o", INK)):
        if points:
            panel.plot(*zip(*points, strict=True), marks, color=color)
    panel.set(xscale="log", yscale="log", xlabel="seconds of pruning", ylabel="excess loss, nats a token")
    panel.margins(0.15)
    name_dots(panel, at)


def name_dots(panel: Any, at: Mapping[str, tuple[float, float]], marked: Collection[str] = tuple(QUALITIES)) -> None:
    """Name each dot on the first of its sides where the name lies over no other and over no dot."""
    points = {name: _points(panel, xy) for name, xy in at.items()}
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in points.values()]
    for name, (x, y) in points.items():
        width = _LETTER * len(name)
        boxes = [(x + dx - width * right, y + dy, x + dx + width * (not right), y + dy + _LINE) for dx, dy, right in _SIDES]
        free = [number for number, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)]
        chosen = free[0] if free else 0
        taken.append(boxes[chosen])
        dx, dy, right = _SIDES[chosen]
        color = ACCENT if name in marked else INK
        panel.annotate(name, at[name], (dx, dy), textcoords="offset points", color=color, ha="right" if right else "left")


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _few_ticks(panel: Any) -> None:
    """Few plain ones, where an axis is logarithmic."""
    for axis in (panel.xaxis, panel.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            steps = [mantissa * 10.0**power for power in range(-4, 6) for mantissa in (1, 2, 5)]
            axis.set_ticks([step for step in steps if low <= step <= high])
            axis.set_ticks([], minor=True)
            axis.set_major_formatter("{x:g}")
