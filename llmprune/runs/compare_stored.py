"""Cells of a comparison by size: models pruned, rounded to few bits, stored, and measured as they are stored."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmprune.base.errors import InputError
from llmprune.base.notation import BITS
from llmprune.formats.convert import least_bytes
from llmprune.formats.loading import load
from llmprune.job.recipes import QUALITIES
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import resolve
from llmprune.reports.sizes import DENSE, STORED
from llmprune.runs.compare_texts import dense_perplexity, evaluation
from llmprune.runs.prune import prune, quantise


def check_bits(bits: Sequence[int]) -> None:
    """Raises: InputError: there are no such codes."""
    for number in bits:
        if number not in (STORED, *BITS):
            raise InputError(f"bits {number} is impossible: give {', '.join(map(str, BITS))} or {STORED}, which is not rounded")


def stored_cells(
    name: str, method: str, pattern: str, seed: int, bits: Sequence[int], settings: dict[str, Any], device: str
) -> Iterator[dict[str, Any]]:
    """A cell for each of `bits`, 16 being the weights as pruning stores them. One pruned folder is rounded to each."""
    text, seqlen, windows = (settings[key] for key in ("text", "seqlen", "windows"))
    asked: dict[str, Any] = {"calibration": text, "eval_text": "none", "samples": settings["samples"], "seqlen": seqlen}
    asked |= {"seed": seed, "device": device, "dtype": "float32"}
    original = resolve(name).path
    held_out = evaluation(original, windows, text, seqlen)[1]
    dense = dense_perplexity(original, windows, text, seqlen, device).value
    with tempfile.TemporaryDirectory(prefix="llmprune-") as scratch:
        source, seconds = original, 0.0
        if pattern != DENSE:
            source = Path(scratch) / "pruned"
            pruning = asked | {"sparsity": pattern, "quality" if method in QUALITIES else "method": method}
            seconds = prune(name, output=source, **pruning).record.pruning_seconds()
        for number in bits:
            folder, rounding = source, 0.0
            if number != STORED:
                folder = Path(scratch) / f"{number}"
                rounding = quantise(source, folder, bits=number, **asked).record.pruning_seconds()
            found = perplexity(load(folder, device=device, dtype="float32", dense=True), held_out).value
            nbytes, weights = least_bytes(folder)
            yield {
                "method": method,
                "sparsity": pattern,
                "bits": number,
                "seed": seed,
                "bits_per_weight": 8 * nbytes / weights,
                "dense": dense,
                "perplexity": found,
                "excess_loss": math.log(found / dense),
                "seconds": seconds + rounding,
            }
