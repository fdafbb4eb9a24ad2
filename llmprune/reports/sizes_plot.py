"""Loss by size, as a plot: what is best for its bytes in colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmprune.reports.comparison import Cells
from llmprune.reports.comparison_plot import ACCENT, INK, draw, name_dots
from llmprune.reports.sizes import Sized, best, by_size

_LINEAR = 0.005  # nats; losses up to here are drawn to scale, larger ones by their logarithm


def plot(cells: Cells, file: Path) -> bool:
    """A panel a model: excess loss against bits a weight. False: matplotlib is not installed."""
    models = by_size(cells)

    def fill(panels: Any) -> None:
        for panel, (model, own) in zip(panels[:, 0], models.items(), strict=True):
            _fill(panel, own)
            panel.set_title(f"{model}: held-out loss by size")

    return draw(file, (len(models), 1), (8.4, 4.6 * len(models)), fill)


def _fill(panel: Any, own: Sequence[Sized]) -> None:
    front = best(own)
    for pattern in dict.fromkeys((one.pattern, one.method) for one in own):
        line = [(one.size, one.loss) for one in own if (one.pattern, one.method) == pattern]
        panel.plot(*zip(*line, strict=True), "-", color=INK, linewidth=0.6)
    for models, color in ((own, INK), (front, ACCENT)):
        panel.plot([one.size for one in models], [one.loss for one in models], "o", color=color, markersize=3.5)
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=_LINEAR)
    panel.set(xlabel="bits a weight, as stored", ylabel="excess loss, nats a token")
    panel.margins(0.12)
    panel.set_xticks([size for size in (1, 2, 3, 4, 6, 8, 12, 16, 32) if own[0].size / 1.2 <= size <= own[-1].size * 1.2])
    panel.set_xticks([], minor=True)
    panel.xaxis.set_major_formatter("{x:g}")
    name_dots(panel, {one.label: (one.size, one.loss) for one in own}, [one.label for one in front])
