"""A comparison of methods, as the tables that papers print."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from llmprune.base.words import size
from llmprune.job.recipes import QUALITIES

PATTERNS = ("2:4", "4:8", "50%", "60%", "70%")
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
        return [f"{self.mean('seconds'):.0f}", size(statistics.mean(peaks)) if peaks else ""]


Own: TypeAlias = dict[tuple[str, str], Draws]  # one model's, by method and pattern


def called(cells: Cells) -> dict[str, str]:
    """Of each checkpoint what the model is called: the last part of the name, where no other model's ends so."""
    asked = {cell["checkpoint"]: cell["model"] for cell in reversed(cells)}
    short = [Path(name).name for name in asked.values()]
    return {key: name if short.count(Path(name).name) > 1 else Path(name).name for key, name in asked.items()}


def by_model(cells: Cells) -> dict[str, Own]:
    """By what the models are called."""
    names, models = called(cells), dict[str, Own]()
    for cell in cells:
        own = models.setdefault(names[cell["checkpoint"]], {})
        own.setdefault((cell["method"], cell["sparsity"]), Draws([])).cells.append(cell)
    return models


def papers_table(cells: Cells) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """A table a model, as papers print it: name, header, rows; perplexity by method and pattern, the dense model on top."""
    for model, own in by_model(cells).items():
        patterns, at = _patterns(own), priced(own)
        rows = [["dense", *[f"{dense_perplexity(own):.2f}"] * len(patterns), "", ""]]
        for method in _methods(own):
            row = [own[method, p].shown("perplexity", ".2f") if (method, p) in own else "" for p in patterns]
            cost = own.get((method, at))
            rows.append([method, *row, *(cost.price() if cost else ["", ""])])
        yield model, ["method", *patterns, f"seconds, {at}", "peak memory"], rows


def dense_perplexity(own: Own) -> float:
    return next(iter(own.values())).mean("dense")


def _patterns(own: Own) -> list[str]:
    there = dict.fromkeys(pattern for _, pattern in own)
    return sorted(there, key=lambda p: PATTERNS.index(p) if p in PATTERNS else len(PATTERNS))


def priced(own: Own) -> str:
    patterns = _patterns(own)
    return PRICED if PRICED in patterns else patterns[0]


def _methods(own: Own) -> list[str]:
    """The methods by what they lose at the pattern that is priced, most first, and then the presets."""
    at = priced(own)
    there = dict.fromkeys(method for method, _ in own)
    lost = {method: own[method, at].mean("excess_loss") if (method, at) in own else math.inf for method in there}
    alone = sorted((method for method in there if method not in QUALITIES), key=lambda method: -lost[method])
    return alone + [preset for preset in QUALITIES if preset in there]


def tables(cells: Cells) -> str:
    """A table a model in Markdown: excess loss by method and pattern, and what the pattern that is priced cost."""
    lines: list[str] = []
    for model, own in by_model(cells).items():
        patterns, at = _patterns(own), priced(own)
        lines += [
            f"`{model}`, dense perplexity {dense_perplexity(own):.2f}; excess loss in nats a token:",
            "",
            f"| method | {' | '.join(patterns)} | seconds, {at} |",
            f"|---|{'---:|' * (len(patterns) + 1)}",
        ]
        for method in (method for method in _methods(own) if (method, at) in own):
            losses = [own[method, p].shown("excess_loss", ".4f") if (method, p) in own else "" for p in patterns]
            lines.append(f"| {' | '.join([method, *losses, own[method, at].price()[0]])} |")
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
