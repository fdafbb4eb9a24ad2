"""The one look of all figures: few plain lines, no background, so that they suit a light page and a dark one."""

from __future__ import annotations

from typing import Any


def style(ink: str, faint: str) -> dict[str, Any]:
    """Matplotlib's settings, in the colours of text and of lines; the same bytes for the same data."""
    return {
        "svg.hashsalt": "llmprune",
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9,
        "text.color": ink,
        "axes.edgecolor": faint,
        "axes.labelcolor": ink,
        "axes.titlesize": 9,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "xtick.color": ink,
        "ytick.color": ink,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "grid.color": faint,
        "grid.linewidth": 0.6,
    }
