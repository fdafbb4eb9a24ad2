"""The figures of a report as inline SVG: the same bytes for the same data, in colours that the page sets by its theme.

Runs that share a figure go by their numbers, which the page explains beside their names.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmprune.reports.style import style

Draw = Callable[[Sequence[dict[str, Any]]], str]
_WIDTH = 4.1  # inches
_MANY = 400  # cells that are drawn one by one; more become an image
_FEW = 12  # columns whose cells have room for a number
# stand-ins, which become the page's own colours
_INK, _FAINT, _BACK = "#010203", "#010205", "#010207"
SERIES = [f"#0102{16 + number:02x}" for number in range(6)]
LINES = ("-", "--")
_VARIABLES = {_INK: "ink", _FAINT: "faint", _BACK: "panel"} | {color: f"s{number}" for number, color in enumerate(SERIES)}
_TURNS = "heat"  # how the ids end of what the page turns light for dark
_HEAT = LinearSegmentedColormap.from_list("heat", ["#e9eef5", "#9dbbe0", "#4a7fc1", "#1f4e8c", "#12305a"])


def figures(page: dict[str, Any]) -> dict[str, str]:
    """SVG by name: `perplexity`, `growth`, `seconds`, `memory`, `price` hold all runs; `error0`, `mask0-0`, ... one."""
    runs = page["runs"]
    found = {name: draw(runs) for name, draw in _TOGETHER.items()}
    for number, run in enumerate(runs):
        found |= {f"{name}{number}": heat(grid, share=name == "zeros") for name, grid in run["maps"].items()}
        found |= {f"mask{number}-{own}": mask(one) for own, one in enumerate(run["masks"])}
        if run["fit"]:
            found[f"fit{number}"] = fit(run["fit"])
        for order, told in enumerate(run["recoveries"]):
            found[f"recovery{number}-{order}"] = fit(told["fit"]) if "fit" in told else learning(told)
        if run["kept"]:
            found[f"kept{number}"] = heat(run["kept"], share=True)
    return {name: own_names(svg, name) for name, svg in found.items() if svg}


def perplexity(runs: Sequence[dict[str, Any]]) -> str:
    """Before and after, a line a run; nothing where no run measured it."""
    pairs = [[run["facts"][f"perplexity_{when}"]["value"] for when in ("before", "after")] for run in runs]
    shown = [(run, *pair) for run, pair in zip(runs, pairs, strict=True) if None not in pair]
    if not shown:
        return ""
    with drawing(0.62 + 0.42 * len(shown)) as (axes, finished):
        for row, (run, before, after) in enumerate(shown):
            color = SERIES[runs.index(run) % len(SERIES)]
            axes.plot([before, after], [row, row], color=color, linewidth=2, alpha=0.5, solid_capstyle="round")
            axes.plot([before], [row], "o", color=_BACK, markeredgecolor=color, markeredgewidth=1.8, markersize=8)
            axes.plot([after], [row], "o", color=color, markersize=8)
            _beside(axes, (before, row), run["facts"]["perplexity_before"]["text"], left=before <= after)
            _beside(axes, (after, row), run["facts"]["perplexity_after"]["text"], left=before > after)
        axes.set_yticks(range(len(shown)), [_number(runs, runs.index(run)) for run, *_ in shown])
        axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel="perplexity: open before, filled after")
        axes.margins(x=0.3)
        axes.spines["left"].set_visible(False)
    return finished()


def _beside(axes: Axes, place: tuple[float, float], text: str, *, left: bool) -> None:
    offset, side = ((-9, 0), "right") if left else ((9, 0), "left")
    axes.annotate(text, place, offset, textcoords="offset points", va="center", ha=side)


def growth(runs: Sequence[dict[str, Any]]) -> str:
    """Mean output error by depth, one line a run; of a single run the range of its matrices too."""
    shown = [(number, run["growth"]) for number, run in enumerate(runs) if run["growth"]]
    if not shown:
        return ""
    with drawing(2.5) as (axes, finished):
        for number, found in shown:
            color, blocks = SERIES[number % len(SERIES)], found["blocks"]
            if len(runs) == 1:
                edges = [[100 * error for error in found[edge]] for edge in ("least", "largest")]
                axes.fill_between(blocks, *edges, color=color, alpha=0.15, linewidth=0)
            errors, line = [100 * error for error in found["mean"]], LINES[number // len(SERIES) % len(LINES)]
            axes.plot(blocks, errors, line, color=color, marker=marker(blocks), markersize=4)
        _by_block(axes)
    return finished()


def fit(errors: dict[str, Any]) -> str:
    """A block's output error before and after its fit, by depth."""
    with drawing(2.5) as (axes, finished):
        for when, color in (("before", SERIES[5]), ("after", SERIES[0])):
            shares = [100 * error for error in errors[when]]
            axes.plot(errors["blocks"], shares, color=color, marker=marker(shares), markersize=4, label=f"{when} the fit")
        _by_block(axes)
        axes.legend(frameon=False, fontsize=8.5)
    return finished()


def learning(told: dict[str, Any]) -> str:
    """The loss by step of a training, on held-out windows and on those that were trained on."""
    with drawing(2.5) as (axes, finished):
        for what, title, color in (("trained", "trained on", SERIES[5]), ("held_out", "held out", SERIES[0])):
            if told[what]:
                axes.plot(*zip(*told[what], strict=True), color=color, marker="o", markersize=3, label=title)
        axes.set(xlabel="step", ylabel=f"{label(told['aim'])}, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.legend(frameon=False, fontsize=8.5)
    return finished()


def _by_block(axes: Axes) -> None:
    axes.set(xlabel="block", ylabel="output error, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")


def seconds(runs: Sequence[dict[str, Any]]) -> str:
    """By phase, a bar a run."""
    return _by_phase([run["seconds"] for run in runs], "seconds")


def memory(runs: Sequence[dict[str, Any]]) -> str:
    """Each phase's peak, a bar a run."""
    where = " or ".join(dict.fromkeys(run["phase_memory"]["of"] for run in runs))
    return _by_phase([run["phase_memory"]["mebibytes"] for run in runs], f"MiB, {where}")


def _by_phase(runs: Sequence[dict[str, float]], what: str) -> str:
    phases = list(dict.fromkeys(phase for run in runs for phase in run))
    if not phases:
        return ""
    width = 0.72 / len(runs)
    with drawing(0.5 + len(phases) * max(0.3, 0.13 * len(runs))) as (axes, finished):
        for number, run in enumerate(runs):
            own = [(row, run[phase]) for row, phase in enumerate(phases) if phase in run]
            places = [row + (number - (len(runs) - 1) / 2) * width for row, _ in own]
            bars = axes.barh(places, [taken for _, taken in own], width * 0.9, color=SERIES[number % len(SERIES)])
            if len(runs) == 1:
                axes.bar_label(bars, [_short(taken) for _, taken in own], padding=4)
        axes.set_yticks(range(len(phases)), [label(phase) for phase in phases])
        axes.set(ylim=(len(phases) - 0.5, -0.5), xlabel=what)
        axes.margins(x=0.12)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    return finished()


def price(runs: Sequence[dict[str, Any]]) -> str:
    """Excess loss against seconds of pruning, a dot a run; nothing for a single run."""
    facts = [(run["facts"]["seconds"]["value"], run["facts"]["excess_loss"]["value"]) for run in runs]
    at: dict[tuple[float, float], list[int]] = {}
    for number, (taken, loss) in enumerate(facts):
        if loss is not None:
            at.setdefault((taken, loss), []).append(number)
    if len(runs) == 1 or not at:
        return ""
    with drawing(2.5) as (axes, finished):
        for place, numbers in at.items():
            color, labels = SERIES[numbers[0] % len(SERIES)], ", ".join(_number(runs, number) for number in numbers)
            axes.plot(*([one] for one in place), "o", color=color, markersize=8)
            axes.annotate(labels, place, (0, 8), textcoords="offset points", color=color, ha="center")
        axes.set(xlabel="seconds of pruning", ylabel="excess loss")
        axes.margins(0.2)
        axes.grid()
        axes.set_axisbelow(True)
    return finished()


def heat(grid: dict[str, Any], *, share: bool) -> str:
    """A map over depth and rows. `share`: the scale is 0 to 1, else 0 to the largest."""
    values = np.array(grid["values"], dtype=float)
    rows, columns = values.shape
    top = 1.0 if share else max(float(np.nanmax(values)), 1e-9)
    with drawing(0.55 + 0.3 * rows) as (axes, finished):
        many = values.size > _MANY
        axes.pcolormesh(np.ma.masked_invalid(values), cmap=_HEAT, vmin=0, vmax=top, rasterized=many, gid=_TURNS)
        if not many:
            _gaps(axes, np.arange(rows + 1.0), np.arange(columns + 1.0), 2)
        if columns <= _FEW:
            texts = grid.get("texts") or [[_percent(value) for value in row] for row in values]
            for row, column in np.argwhere(np.isfinite(values)):
                color, gid = "#ffffff" if values[row, column] > 0.45 * top else "#12305a", f"{row}-{column}-{_TURNS}"
                axes.text(column + 0.5, row + 0.5, texts[row][column], color=color, ha="center", va="center", size=7.5, gid=gid)
        axes.set_yticks(np.arange(rows) + 0.5, [label(row) for row in grid["rows"]])
        step = -(-columns // _FEW)
        axes.set_xticks(np.arange(0, columns, step) + 0.5, [str(block) for block in grid["blocks"][::step]])
        axes.set(xlabel="block")
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
    return finished()


def _gaps(axes: Axes, rows: Any, columns: Any, width: float) -> None:
    """Lines in the page's colour between cells."""
    (left, right), (first, last) = axes.get_xlim(), axes.get_ylim()
    axes.hlines(rows, left, right, color=_BACK, linewidth=width)
    axes.vlines(columns, first, last, color=_BACK, linewidth=width)


def mask(one: dict[str, Any]) -> str:
    """The density picture, and below it a corner weight by weight."""
    corner = np.array(one["corner"])
    with drawing(2.9, rows=2, ratios=(1, 1.25)) as (panels, finished):
        density = np.array(one["density"])
        panels[0].imshow(density, cmap=_HEAT, vmin=0, vmax=1, aspect="auto", interpolation="none")
        panels[1].imshow(corner, cmap=_HEAT, vmin=0, vmax=1.25, aspect="auto", interpolation="none")
        rows, columns = (np.arange(size + 1) - 0.5 for size in corner.shape)
        _gaps(panels[1], rows, columns, 1.2)
        if one["period"] > 1:
            _gaps(panels[1], rows[:0], columns[:: one["period"]], 5)
        for panel, title in zip(panels, (_density_title(one), _corner_title(corner)), strict=True):
            panel.set_title(title, fontsize=8.5, loc="left")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    return finished()


def _density_title(one: dict[str, Any]) -> str:
    rows, columns = one["rows"], one["columns"]
    which = f"first {columns}" if one["period"] > 1 else f"{columns}"
    return f"share kept: {rows} outputs down, {which} inputs across"


def _corner_title(corner: Any) -> str:
    return f"first {corner.shape[0]} outputs x {corner.shape[1]} inputs, kept filled"


@contextmanager
def drawing(height: float, rows: int = 1, ratios: Sequence[float] = (1,)) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Axes to draw on, and what gives the SVG afterwards."""
    made: list[str] = []
    with matplotlib.style.context(["default", style(_INK, _FAINT)], after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes: Axes | Sequence[Axes] = figure.subplots(rows, 1, height_ratios=ratios)
        yield axes, lambda: made[0]
        made.append(_svg(figure))


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", dpi=150, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    svg = re.sub(r"<!--.*?-->\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg, count=1
    )


def own_names(svg: str, name: str) -> str:
    """The ids of a figure, made its own on a page of many."""
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    return svg.replace("xlink:href=", "href=").replace("url(#", f"url(#{name}-")


def _number(runs: Sequence[dict[str, Any]], number: int) -> str:
    """What a run is called in a figure."""
    return str(number + 1) if len(runs) > 1 else ""


def marker(blocks: Sequence[float]) -> str:
    return "o" if len(blocks) <= 2 * _FEW else ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if value < 0.1 else f"{100 * value:.0f}"


def label(text: str, most: int = 28) -> str:
    """`text` as a label: what cannot be shown is replaced, and what is long is cut."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


_TOGETHER: dict[str, Draw] = {"perplexity": perplexity, "growth": growth, "seconds": seconds, "memory": memory, "price": price}
