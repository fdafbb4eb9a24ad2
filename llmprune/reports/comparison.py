"""A comparison of methods, as tables and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from llmprune.job.recipes import QUALITIES

PATTERNS = ("2:4", "4:8", "50%", "60%", "70%")


_LABELS = {  # where the plot names a method, in points from its dot, so that names do not overlap
    **dict.fromkeys(QUALITIES, ((-4, -13), "right")),
    "ria": ((5, -11), "left"),
    "dsnot": ((-5, 2), "right"),
    "wanda": ((7, -3), "left"),
}


PRICED = "2:4"  # the pattern whose seconds and memory the short table and the plot show


Cells: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Draws:
    """The cells of one model, method and pattern: one a calibration draw."""

    cells: Cells

    def mean(self, number: str) -> float:
        """Of a number that each cell has, such as `excess_loss`."""
        return statistics.mean(cell[number] for cell in self.cells)

    def shown(self, number: str, form: str) -> str:
        """The mean and, of several draws, their standard deviation (n - 1)."""
        values = [cell[number] for cell in self.cells]
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{spread}"

    def price(self) -> list[str]:
        """Seconds, and memory where it was measured."""
        peaks = [cell["peak_memory_bytes"] for cell in self.cells if "peak_memory_bytes" in cell]
        return [f"{self.mean('seconds'):.0f}", f"{statistics.mean(peaks) / 2**20:,.0f} MiB" if peaks else ""]


Own: TypeAlias = dict[tuple[str, str], Draws]  # one model's, by method and pattern


def by_model(cells: Cells) -> dict[str, Own]:
    """By what the models are called: the last part of the name, where no other model's ends so."""
    asked = {cell["checkpoint"]: cell["model"] for cell in reversed(cells)}
    short = [Path(name).name for name in asked.values()]
    called = {key: name if short.count(Path(name).name) > 1 else Path(name).name for key, name in asked.items()}
    models: dict[str, Own] = {}
    for cell in cells:
        own = models.setdefault(called[cell["checkpoint"]], {})
        own.setdefault((cell["method"], cell["sparsity"]), Draws([])).cells.append(cell)
    return models


def papers_table(cells: Cells) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """A table a model, as papers print it: name, header, rows; perplexity by method and pattern, the dense model on top."""
    for model, own in by_model(cells).items():
        patterns, priced = _patterns(own), _priced(own)
        rows = [["dense", *[f"{_dense(own):.2f}"] * len(patterns), "", ""]]
        for method in _methods(own):
            row = [own[method, p].shown("perplexity", ".2f") if (method, p) in own else "" for p in patterns]
            cost = own.get((method, priced))
            rows.append([method, *row, *(cost.price() if cost else ["", ""])])
        yield model, ["method", *patterns, f"seconds, {priced}", "peak memory"], rows


def _dense(own: Own) -> float:
    return next(iter(own.values())).mean("dense")


def _patterns(own: Own) -> list[str]:
    there = dict.fromkeys(pattern for _, pattern in own)
    return sorted(there, key=lambda p: PATTERNS.index(p) if p in PATTERNS else len(PATTERNS))


def _priced(own: Own) -> str:
    patterns = _patterns(own)
    return PRICED if PRICED in patterns else patterns[0]


def _methods(own: Own) -> list[str]:
    """The methods by what they lose at the pattern that is priced, most first, and then the presets."""
    priced = _priced(own)
    there = dict.fromkeys(method for method, _ in own)
    lost = {method: own[method, priced].mean("excess_loss") if (method, priced) in own else math.inf for method in there}
    alone = sorted((method for method in there if method not in QUALITIES), key=lambda method: -lost[method])
    return alone + [preset for preset in QUALITIES if preset in there]


def tables(cells: Cells) -> str:
    """A table a model in Markdown: excess loss by method and pattern, and what the pattern that is priced cost."""
    lines: list[str] = []
    for model, own in by_model(cells).items():
        patterns, priced = _patterns(own), _priced(own)
        lines += [
            f"`{model}`, dense perplexity {_dense(own):.2f}; excess loss in nats a token:",
            "",
            f"| method | {' | '.join(patterns)} | seconds, {priced} |",
            f"|---|{'---:|' * (len(patterns) + 1)}",
        ]
        for method in (method for method in _methods(own) if (method, priced) in own):
            losses = [own[method, p].shown("excess_loss", ".4f") if (method, p) in own else "" for p in patterns]
            lines.append(f"| {' | '.join([method, *losses, own[method, priced].price()[0]])} |")
        lines.append("")
    return "\n".join(lines)


def listing(cells: Cells) -> str:
    """Every model, pattern and method with all that was measured."""
    lines = [
        "# Every method x pattern\n",
        "Written by `llmprune compare`; the .json beside has every cell, with date, versions and device. Of several",
        "calibration draws: mean ± standard deviation. Output error: mean of the matrices', each on the inputs it was solved",
        "for. Overhead: time of pruning / time of its forward passes. Memory of a process depends on what it did before.\n",
        "| model | pattern | method | draws | perplexity | excess loss | output error | seconds | overhead | peak memory |",
        f"|---|---|---|{'---:|' * 7}",
    ]
    for model, own in sorted(by_model(cells).items()):
        for (method, pattern), draws in sorted(own.items(), key=lambda one: (one[0][1], -one[1].mean("excess_loss"))):
            seconds, memory = draws.price()
            numbers = [draws.shown("perplexity", ".2f"), draws.shown("excess_loss", ".4f"), draws.shown("output_error", ".2%")]
            cost = [seconds, f"{draws.mean('overhead'):.2f}x", memory]
            lines.append(f"| {' | '.join([model, pattern, method, str(len(draws.cells)), *numbers, *cost])} |")
    return "\n".join(lines) + "\n"


def plot(cells: Cells, file: Path) -> bool:
    """Two panels a model: perplexity against sparsity, excess loss against seconds. False: matplotlib is not installed."""
    try:
        import matplotlib as mpl
        from matplotlib import pyplot as plt
    except ImportError:
        return False
    mpl.rcParams |= {"svg.hashsalt": "llmprune", "svg.fonttype": "none", "font.size": 9}
    models = by_model(cells)
    figure, panels = plt.subplots(len(models), 2, figsize=(9.2, 3.4 * len(models)), squeeze=False, layout="constrained")
    for (left, right), (model, own) in zip(panels, models.items(), strict=True):
        _plot_perplexity(left, own)
        _plot_cost(right, own)
        left.set_title(f"{model}: held-out perplexity")
        right.set_title(f"{model}: what {_priced(own)} costs")
    for panel in panels.flat:
        _pale(panel)
    figure.patch.set_alpha(0)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True


_INK, _ACCENT = "#808080", "#d9730d"  # readable on light and dark pages


def _plot_perplexity(panel: Any, own: Own) -> None:
    """A line a method over unstructured sparsities; N:M patterns are dots at theirs."""
    dense = _dense(own)
    panel.axhline(dense, color=_INK, linestyle=":", linewidth=1)
    panel.annotate("dense", (0, dense), (2, -10), xycoords=("axes fraction", "data"), textcoords="offset points", color=_INK)
    ends: list[tuple[float, float, str, str]] = []
    for method in dict.fromkeys(method for method, _ in own):
        points = sorted((_share(p), draws.mean("perplexity"), ":" in p) for (m, p), draws in own.items() if m == method)
        color = _ACCENT if method in QUALITIES else _INK
        line = [(x, y) for x, y, fixed in points if not fixed]
        dots = [(x, y) for x, y, fixed in points if fixed]
        if line:
            panel.plot(*zip(*line, strict=True), "-", color=color, linewidth=1)
        if dots:
            panel.plot(*zip(*dots, strict=True), "o", color=color, markersize=3)
        ends.append((*(line or dots)[-1], method, color))
    _name_ends(panel, ends)
    panel.set(yscale="log", xlabel="sparsity (dots: N:M)", ylabel="perplexity")
    panel.margins(x=0.25)
    panel.xaxis.set_major_formatter("{x:.0%}")


def _name_ends(panel: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Name each line at its end, none over another."""
    values = [math.log(y) for _, y, _, _ in ends]
    points = 190 / max(max(values) - min(values), 0.1)  # of the panel's height, a unit of log perplexity
    lowest = -math.inf
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        at = math.log(y) * points
        lowest = max(at, lowest + 9)
        panel.annotate(name, (x, y), (4, lowest - at - 3), textcoords="offset points", color=color)


def _share(pattern: str) -> float:
    """The fraction of zeros that a pattern asks for."""
    kept, _, of = pattern.partition(":")
    return 1 - int(kept) / int(of) if of else float(pattern.rstrip("%")) / 100


def _plot_cost(panel: Any, own: Own) -> None:
    """Excess loss against seconds of pruning; the presets in colour."""
    priced = _priced(own)
    found = {m: (draws.mean("seconds"), draws.mean("excess_loss")) for (m, p), draws in own.items() if p == priced}
    at = {method: cost for method, cost in found.items() if cost[1] > 0}
    presets = [at[name] for name in QUALITIES if name in at]
    others = [xy for name, xy in at.items() if name not in QUALITIES]
    for points, style, color in ((presets, "o-", _ACCENT), (others, "o", _INK)):
        if points:
            panel.plot(*zip(*points, strict=True), style, color=color)
    for method, xy in at.items():
        offset, side = _LABELS.get(method, ((5, 4), "left"))
        color = _ACCENT if method in QUALITIES else _INK
        panel.annotate(method, xy, offset, textcoords="offset points", color=color, ha=side)
    panel.set(xscale="log", yscale="log", xlabel="seconds of pruning", ylabel="excess loss, nats a token")
    panel.margins(0.15)


def _pale(panel: Any) -> None:
    """Axes that suit any page: few plain ticks, no background."""
    for axis in (panel.xaxis, panel.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            steps = [mantissa * 10.0**power for power in range(-4, 6) for mantissa in (1, 2, 5)]
            axis.set_ticks([step for step in steps if low <= step <= high])
            axis.set_ticks([], minor=True)
            axis.set_major_formatter("{x:g}")
    panel.patch.set_alpha(0)
    panel.tick_params(which="both", colors=_INK)
    for part in (panel.title, panel.xaxis.label, panel.yaxis.label):
        part.set_color(_INK)
    for spine in panel.spines.values():
        spine.set_color(_INK)
