"""`llmprune compare`: models pruned by several methods to several patterns, and rounded to several widths, cell by cell."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from llmprune.base.errors import InputError, plain_errors
from llmprune.base.files import file_to_write, read_json, sha256, write_whole
from llmprune.base.hardware import device_name, pick_device, restart_peak_memory
from llmprune.base.notation import listed
from llmprune.job.recipes import QUALITIES
from llmprune.job.record import versions
from llmprune.measure.perplexity import perplexity
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.resolve import resolve, spelled
from llmprune.numerics.patterns import parse
from llmprune.reports import sizes
from llmprune.reports.comparison import PATTERNS, Cells, listing
from llmprune.reports.sizes import DENSE
from llmprune.runs.compare_stored import check_bits, stored_cells
from llmprune.runs.compare_texts import dense_perplexity, evaluation, load_float32
from llmprune.runs.prune import prune
from llmprune.solvers import METHODS

CHOICES = (*METHODS.names(), *QUALITIES)
DEFAULT, SIZED = ("balanced",), (DENSE, "50%", "2:4", "70%")  # with bits


def compare(
    models: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    methods: str | Sequence[str] | None = None,
    patterns: str | Sequence[str] | None = None,
    seeds: int = 1,
    text: str = "pydoc",
    samples: int = 128,
    seqlen: int = 512,
    windows: int | None = 100,
    bits: Sequence[int] = (),
    device: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> Cells:
    """Prune every model by every method or preset to every pattern, in memory, in float32.

    Calibration and evaluation take the splits of one text, and all cells share both. A cell that `output`, a JSON file, has
    already is kept, so that a comparison can be stopped, and goes on when it is asked for again; so is the perplexity of the
    dense model. Models are told apart by their weights, not by their names.

    With `bits` each pattern is rounded to codes of so many bits, 16 being none, through folders that are gone afterwards; what
    is measured are the weights as they are stored, and how many bits one takes. The pattern `dense` is the model unpruned.

    Args:
        seeds: calibration draws, with seeds 0, 1, ...: each is a cell of its own.
        windows: evaluation windows, the first ones; None: all.
        bits: of codes; with them `methods` and `patterns` are by default `balanced`, and `dense`, 50%, 2:4 and 70%.
        tell: hears of every cell that is done.

    Raises:
        InputError: a name is unknown, a model or text cannot be loaded, or the file is another's: of other settings, versions
            or weights, or from another device.
    """
    output, methods = file_to_write(str(output)), listed(methods or (DEFAULT if bits else CHOICES))
    check_bits(bits)
    for method in methods:
        if method not in QUALITIES:
            METHODS.get(method)
    for name, value in {"windows": windows, "seeds": seeds}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is impossible: give at least 1")
    given = listed(patterns or (SIZED if bits else PATTERNS))
    names = [pattern if bits and pattern == DENSE else str(parse(pattern)) for pattern in given]
    called = [spelled(models)] if isinstance(models, (str, Path)) else [spelled(model) for model in models]
    with plain_errors():
        settings = {
            "text": text, "samples": samples, "seqlen": seqlen, "windows": windows,
            "dtype": "float32, as stored" if bits else "float32",
            "device": device_name(pick_device(device)), "threads": torch.get_num_threads(), "versions": versions(),
        }  # fmt: skip
        checkpoints = {model: digest(resolve(model).path) for model in called}
        cells = _known(output, settings, checkpoints)
        done = {(cell["checkpoint"], cell["sparsity"], cell["method"], cell["seed"], cell.get("bits")) for cell in cells}
        for model, checkpoint in checkpoints.items():
            for pattern, method, seed in ((p, m, s) for p in names for m in _methods(p, methods) for s in range(seeds)):
                left = [b for b in bits or (None,) if (checkpoint, pattern, method, seed, b) not in done]
                dense = next((cell["dense"] for cell in cells if cell["checkpoint"] == checkpoint), None)
                for found in _measured(model, method, pattern, seed, left, settings, device, dense):
                    cells.append({"model": model, "checkpoint": checkpoint, "date": date.today().isoformat(), **found})
                    done.add((checkpoint, pattern, method, seed, found.get("bits")))
                    write_whole({output: json.dumps(settings | {"cells": cells}, indent=1) + "\n"})
                    if tell:
                        tell(_line(cells[-1]))
        write_whole({output.with_suffix(".md"): sizes.listing(cells) if bits else listing(cells)})
    return cells


def _methods(pattern: str, methods: Sequence[str]) -> Sequence[str]:
    return methods if pattern != DENSE else ("none",)


def _measured(
    model: str,
    method: str,
    pattern: str,
    seed: int,
    bits: Sequence[int | None],
    settings: dict[str, Any],
    device: str,
    dense: float | None,
) -> Iterator[dict[str, Any]]:
    """The cells that are asked for: one for each of `bits`, None being a model in memory that is not rounded."""
    if None in bits:
        yield _measure(model, method, pattern, seed, settings, device, dense)
    elif bits:
        yield from stored_cells(model, method, pattern, seed, [b for b in bits if b is not None], settings, device)


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
    size = f"  {cell['bits']} bits ({cell['bits_per_weight']:.2f} stored)" if "bits" in cell else ""
    what = f"{cell['model']}  {cell['sparsity']}  {cell['method']}{size}  seed {cell['seed']}"
    return f"{what}: perplexity {cell['perplexity']:.3f}, excess loss {cell['excess_loss']:.4f}, {cell['seconds']:.0f} s"


def _measure(
    name: str, method: str, pattern: str, seed: int, settings: dict[str, Any], device: str, dense: float | None
) -> dict[str, Any]:
    """One cell: a fresh model, pruned in memory. `dense` is its perplexity before, where another cell has it."""
    folder, (text, seqlen, windows) = resolve(name).path, (settings[key] for key in ("text", "seqlen", "windows"))
    tokenizer, held_out = evaluation(folder, windows, text, seqlen)
    restart_peak_memory()
    model = load_float32(folder, device)
    how = "quality" if method in QUALITIES else "method"
    options: dict[str, Any] = {how: method, "samples": settings["samples"], "seqlen": seqlen, "sparsity": pattern}
    record = prune(model, tokenizer=tokenizer, calibration=text, eval_text="none", seed=seed, **options).record
    found = perplexity(model, held_out).value
    dense = dense or dense_perplexity(folder, windows, text, seqlen, device).value
    return {
        "method": method,
        "recipe": record.recipe["text"],
        "sparsity": pattern,
        "seed": seed,
        "dense": dense,
        "perplexity": found,
        "excess_loss": math.log(found / dense),
        "output_error": record.output_error(),
        "seconds": record.pruning_seconds(),
        "overhead": record.overhead(),
        "peak_memory_bytes": record.peak_memory.get("device", record.peak_memory["process"]),
    }
