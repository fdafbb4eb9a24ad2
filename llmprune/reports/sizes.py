"""A comparison of models by their size: what each loses, at how many bits a weight, and which is best at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.reports.comparison import Cells, Draws, called

DENSE, STORED = "dense", 16  # no pattern; no codes
_EQUAL = 1.02  # sizes up to here are called equal


@dataclass(frozen=True, slots=True)
class Sized:
    """One model's cells that differ in their calibration draw only."""

    method: str
    pattern: str
    bits: int
    draws: Draws

    @property
    def label(self) -> str:
        pruned = "dense" if self.pattern == DENSE else f"{self.pattern} {self.method}"
        return pruned if self.bits == STORED else f"{pruned}, {self.bits} bits"

    @property
    def size(self) -> float:
        """Bits a weight."""
        return self.draws.mean("bits_per_weight")

    @property
    def loss(self) -> float:
        return self.draws.mean("excess_loss")

    @property
    def numbers(self) -> str:
        return f"({self.size:.2f}, {round(self.loss, 4) + 0.0:.4f})"


def by_size(cells: Cells) -> dict[str, list[Sized]]:
    """Of each model, from the smallest to the largest."""
    names, models = called(cells), dict[str, dict[tuple[str, str, int], Cells]]()
    for cell in cells:
        key = (cell["method"], cell["sparsity"], cell["bits"])
        models.setdefault(names[cell["checkpoint"]], {}).setdefault(key, []).append(cell)
    return {
        model: sorted((Sized(*key, Draws(same)) for key, same in own.items()), key=lambda one: (one.size, one.loss))
        for model, own in models.items()
    }


def best(models: Sequence[Sized]) -> list[Sized]:
    """Those that lose less than every smaller one."""
    return [one for i, one in enumerate(models) if all(one.loss < other.loss for other in models[:i])]


def words(models: Sequence[Sized]) -> list[str]:
    """What wins at equal bytes, in sentences."""
    front = best(models)
    said = [f"Least loss for their bytes, bits a weight and nats: {'; '.join(f'{one.label} {one.numbers}' for one in front)}."]
    dense = [one for one in models if one.pattern == DENSE]
    beaten = []
    for one in (one for one in models if one.pattern != DENSE):
        rivals = [other for other in dense if other.size <= _EQUAL * one.size and other.loss <= one.loss]
        if rivals:
            rival = min(rivals, key=lambda other: other.loss)
            beaten.append(f"{one.label} {one.numbers} by {rival.label} {rival.numbers}")
    if beaten:
        said.append(f"Beaten by a dense model of no more bytes: {'; '.join(beaten)}.")
    return said


def table(models: Sequence[Sized]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; what is best for its bytes is marked."""
    front = {one.label for one in best(models)}
    rows = [
        [
            one.label + (" *" if one.label in front else ""),
            f"{one.size:.2f}",
            one.draws.shown("perplexity", ".2f"),
            one.draws.shown("excess_loss", ".4f"),
            f"{one.draws.mean('seconds'):.0f}",
        ]
        for one in models
    ]
    return ["model (* best for its bytes)", "bits a weight", "perplexity", "excess loss", "seconds"], rows


def markdown(cells: Cells) -> str:
    """A table a model, and what it says."""
    lines: list[str] = []
    for model, own in by_size(cells).items():
        header, rows = table(own)
        dense = own[0].draws.mean("dense")
        lines += [f"`{model}`, dense perplexity {dense:.2f}; excess loss in nats a token:", ""]
        lines += [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", *(f"- {sentence}" for sentence in words(own)), ""]
    return "\n".join(lines)


def listing(cells: Cells) -> str:
    """Every model by size."""
    lines = [
        "# Loss by size\n",
        "Written by `llmprune compare --bits`; the .json beside has every cell, with date, versions and device. Bits a weight:",
        "of blocks' matrices, as `llmprune pack` stores them or as they are, whichever is less; scales and masks counted.\n",
    ]
    return "\n".join([*lines, markdown(cells)])
