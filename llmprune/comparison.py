"""`llmprune compare`: models pruned by several methods to several patterns, cell by cell, and the tables and plots of it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune import solvers
from llmprune.data import Windows, evaluation_windows
from llmprune.errors import InputError, plain_errors
from llmprune.evaluate.perplexity import Perplexity, excess_loss, perplexity
from llmprune.hardware import device_name, pick_device, restart_peak_memory
from llmprune.models.checkpoint import Checkpoint, read_json
from llmprune.models.resolve import resolve
from llmprune.models.skeleton import load_config, load_model, load_tokenizer
from llmprune.patterns import parse
from llmprune.pipeline import prune
from llmprune.recipes import QUALITIES
from llmprune.report.record import versions
from llmprune.stream.publish import sha256, write_whole

METHODS = (*solvers.names(), *QUALITIES)
PATTERNS = ("2:4", "4:8", "50%", "60%", "70%")
_LABELS = {  # where the plot names a method, in points from its dot, so that names do not overlap
    **dict.fromkeys(QUALITIES, ((-4, -13), "right")),
    "ria": ((5, -11), "left"),
    "dsnot": ((-5, 2), "right"),
    "wanda": ((7, -3), "left"),
}
PRICED = "2:4"  # the pattern whose seconds and memory the short table and the plot show
Cells: TypeAlias = list[dict[str, Any]]


def compare(
    models: Sequence[str],
    output: Path,
    *,
    methods: Sequence[str] = METHODS,
    patterns: Sequence[str] = PATTERNS,
    seeds: int = 1,
    text: str = "pydoc",
    samples: int = 128,
    seqlen: int = 512,
    windows: int | None = 100,
    device: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> Cells:
    """Prune every model by every method or preset to every pattern, in memory, in float32.

    Calibration and evaluation take the splits of one text, and all cells share both. A cell that `output`, a JSON file, has
    already is kept, so that a comparison can be stopped, and goes on when it is asked for again. Models are told apart by
    their weights, not by their names.

    Args:
        seeds: calibration draws, with seeds 0, 1, ...: each is a cell of its own.
        windows: evaluation windows, the first ones; None: all.
        tell: hears of every cell that is done.

    Raises:
        InputError: a name is unknown, a model or text cannot be loaded, or the file is another's: of other settings, versions
            or weights, or from another device.
    """
    for method in methods:
        if method not in QUALITIES:
            solvers.load(method)
    for name, value in {"windows": windows, "seeds": seeds}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is impossible: give at least 1")
    names = [str(parse(pattern)) for pattern in patterns]
    with plain_errors():
        settings = {
            "text": text, "samples": samples, "seqlen": seqlen, "windows": windows, "dtype": "float32",
            "device": device_name(pick_device(device)), "threads": torch.get_num_threads(), "versions": versions(),
        }  # fmt: skip
        checkpoints = {model: digest(resolve(model).path) for model in models}
        cells = _known(output, settings, checkpoints)
        done = {(cell["checkpoint"], cell["sparsity"], cell["method"], cell["seed"]) for cell in cells}
        for model, checkpoint in checkpoints.items():
            for pattern, method, seed in ((p, m, s) for p in names for m in methods for s in range(seeds)):
                if (checkpoint, pattern, method, seed) in done:
                    continue
                found = _measure(model, method, pattern, seed, settings, device)
                cells.append({"model": model, "checkpoint": checkpoint, "date": date.today().isoformat(), **found})
                done.add((checkpoint, pattern, method, seed))
                write_whole({output: json.dumps(settings | {"cells": cells}, indent=1) + "\n"})
                if tell:
                    tell(_line(cells[-1]))
        write_whole({output.with_suffix(".md"): listing(cells)})
    return cells


def digest(folder: Path) -> str:
    """Of a checkpoint's configuration and weights; equal for equal ones, wherever they lie."""
    files = sorted({info.file for info in Checkpoint(folder).tensors.values()})
    sums = [sha256(folder / file) for file in ("config.json", *files)]
    return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]


def _known(output: Path, settings: dict[str, Any], checkpoints: dict[str, str]) -> Cells:
    """The cells of an earlier, unfinished comparison with these settings."""
    if not output.exists():
        return []
    found = read_json(output)
    cells = found.get("cells")
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise InputError(f"{output} is no comparison: choose another file")
    was, now = _flat(found), _flat(settings)
    for name in now:
        if was.get(name) != now[name]:
            raise InputError(f"{output} was measured with {name} {was.get(name)}, not {now[name]}: choose another file")
    for cell in cells:
        if checkpoints.get(cell["model"], cell["checkpoint"]) != cell["checkpoint"]:
            raise InputError(f"{output} was measured with other weights of {cell['model']}: choose another file")
    return cells


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, each version as one of its own."""
    rest = {name: value for name, value in settings.items() if name not in ("versions", "cells")}
    return rest | {f"version of {package}": version for package, version in settings.get("versions", {}).items()}


def _line(cell: dict[str, Any]) -> str:
    return (
        f"{cell['model']}  {cell['sparsity']}  {cell['method']}  seed {cell['seed']}: perplexity {cell['perplexity']:.3f}, "
        f"excess loss {cell['excess_loss']:.4f}, {cell['seconds']:.0f} s"
    )


def load(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """The whole model in float32."""
    return load_model(folder, load_config(folder), pick_device(device), torch.float32)


@functools.cache
def evaluation(
    folder: Path, windows: int | None, text: str = "pydoc", seqlen: int = 512
) -> tuple[PreTrainedTokenizerBase, Windows]:
    """The model's tokenizer, and the first windows of a text's evaluation split."""
    tokenizer = load_tokenizer(folder)
    found = evaluation_windows(text, tokenizer, seqlen=seqlen)
    return tokenizer, Windows(found.ids[:windows], found.text)


@functools.cache
def dense_perplexity(
    folder: Path, windows: int | None, text: str = "pydoc", seqlen: int = 512, device: str = "cpu"
) -> Perplexity:
    return perplexity(load(folder, device), evaluation(folder, windows, text, seqlen)[1])


def _measure(name: str, method: str, pattern: str, seed: int, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """One cell: a fresh model, pruned in memory."""
    folder, (text, seqlen, windows) = resolve(name).path, (settings[key] for key in ("text", "seqlen", "windows"))
    tokenizer, held_out = evaluation(folder, windows, text, seqlen)
    restart_peak_memory()
    model = load(folder, device)
    how = "quality" if method in QUALITIES else "method"
    options: dict[str, Any] = {how: method, "samples": settings["samples"], "seqlen": seqlen, "sparsity": pattern}
    record = prune(model, tokenizer=tokenizer, calibration=text, eval_text="none", seed=seed, **options).record
    found, dense = perplexity(model, held_out), dense_perplexity(folder, windows, text, seqlen, device)
    return {
        "method": method,
        "recipe": record.recipe["text"],
        "sparsity": pattern,
        "seed": seed,
        "dense": dense.value,
        "perplexity": found.value,
        "excess_loss": excess_loss(dense, found),
        "output_error": record.output_error(),
        "seconds": record.pruning_seconds(),
        "overhead": record.overhead(),
        "peak_memory_bytes": record.peak_memory.get("device", record.peak_memory["process"]),
    }


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
