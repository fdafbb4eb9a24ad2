"""What `llmprune bench` measured, as sentences and tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from llmprune.measure.bench import Bench


def show(found: Bench, console: Console, *, full: bool = False) -> None:
    """What the numbers say, and below it the tables: of each layer the fewest and the most tokens, or all if `full`."""
    for sentence in found.advice:
        console.print(sentence, soft_wrap=not console.is_terminal)
    console.print()
    if found.model:
        console.print(_model_table(found))
    console.print(_layer_table(found, full))
    if not full and len({time.tokens for time in found.layers}) > 2:
        console.print("fewest and most tokens; --full shows the others")


def _model_table(found: Bench) -> Table:
    table = Table(title="whole model, tokens a second", title_justify="left")
    for name in ("", "batch", "dense", "packed", "speed-up"):
        table.add_column(name, justify="left" if not name else "right")
    for whole in found.model:
        rates = (f"{whole.tokens / seconds:,.0f}" for seconds in (whole.dense, whole.packed))
        table.add_row(whole.phase, str(whole.batch), *rates, f"{whole.speedup:.2f}x")
    return table


def _layer_table(found: Bench, full: bool) -> Table:
    table = Table(title=f"{found.device}, {found.dtype}; memory copies at {found.memory / 1e9:,.0f} GB/s", title_justify="left")
    for name in ("layer (how many)", "tokens", "dense, µs", "packed, µs", "speed-up", "GB/s", "of copy"):
        table.add_column(name, justify="left" if name.startswith("layer") else "right", no_wrap=True)
    ends, last = {bound(time.tokens for time in found.layers) for bound in (min, max)}, ""
    for time in (time for time in found.layers if full or time.tokens in ends):
        shape = f"{time.rows} x {time.columns} ({time.layers})"
        rate = time.packed_bytes / time.packed
        table.add_row(
            "" if shape == last else shape,
            str(time.tokens),
            f"{1e6 * time.dense:,.1f}",
            f"{1e6 * time.packed:,.1f}",
            f"{time.speedup:.2f}x",
            f"{rate / 1e9:,.1f}",
            f"{rate / found.memory:.0%}",
        )
        last = shape
    return table
