"""What a report says, as plain data: the page shows it and its JSON twin holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from llmprune.base.files import PACKED
from llmprune.base.words import count, size
from llmprune.cost.footprint import changes
from llmprune.formats.packed import PackedFolder
from llmprune.job.channels import channels_text
from llmprune.job.naming import asked_text
from llmprune.job.record import Reconstruction, Removal, RunRecord, SiteRecord, excess_loss, mean_known
from llmprune.job.recovery import measure
from llmprune.job.speedup import speed_rows
from llmprune.output.again import NO_COMMAND, again
from llmprune.reports.by_matrix import codes, kind_of, matrices
from llmprune.reports.cells import NONE, Cell, calibration_text, cell, table, text_cell
from llmprune.reports.masks import masks
from llmprune.reports.saved import Bench, Saved

MOST = 12  # runs on a page
NOTHING = "none"  # there is nothing to measure
_MASKS = 4  # on a page of one run; of several, one each at least


def content(runs: Sequence[Saved]) -> dict[str, Any]:
    """All of a report about one run or several."""
    each = [_run(run, max(_MASKS // len(runs), 1)) for run in runs]
    title = count(len(each), "run") if len(each) > 1 else each[0]["label"]
    return {"report": 1, "title": title, "compared": _compared(each) if len(each) > 1 else None, "runs": each}


def _run(run: Saved, pictures: int) -> dict[str, Any]:
    record, packed, command = run.record, _packed_bytes(run), again(run.record)
    found = {
        "label": run.label,
        "model": record.model["name"],
        "asked": asked_text(asdict(run.config)),
        "method": record.recipe["text"],
        "protocol": _protocol(record),
        "calibration": calibration_text(record.calibration),
        "compute": "{dtype} on {device}".format(**record.compute),
        "facts": _facts(record, packed),
        "maps": _maps(record),
        "kept": _kept(record.removals),
        "removed_layers": record.structure.get("removed_layers", []),
        "fit": _fit(record.reconstructions),
        "recoveries": [_recovery(own) for own in record.recoveries],
        "growth": _growth(record.sites or record.removals),
        "seconds": dict(record.seconds),
        "phase_memory": _phase_memory(record),
        "memory": _memory(record),
        "sizes": _sizes(record, packed),
        "masks": masks(run.folder, record.sites, pictures) if run.folder else [],
        "timed": _timed(record),
        "speed": _speed(run.bench) if run.bench else None,
        "matrices": matrices(record),
        "codes": codes(record),
        "left_out": _left_out(record.skipped),
        "channels": [channels_text(kind, own) for kind, own in record.channels.items()],
        "spread": record.recipe["allocation"]["text"] if "allocation" in record.recipe else None,
        "command": command,
        "no_command": None if command else NO_COMMAND,
        "versions": run.versions,
    }
    return found


def _facts(record: RunRecord, packed: int | None) -> dict[str, Cell]:
    """The headline numbers. A value of None was not measured."""
    dense, pruned = record.dense, record.pruned
    stored, weights = record.size, record.weights()
    return {
        "perplexity_before": cell(dense.value if dense else None, _figure),
        "perplexity_after": cell(pruned.value if pruned else None, _figure),
        "excess_loss": cell(excess_loss(dense, pruned) if dense and pruned else None, "{:+.4f}".format),
        "zeros": cell(record.zeros() / weights if weights else None, "{:.2%}".format, NOTHING),
        "output_error": cell(record.output_error(), "{:.2%}".format, NONE if record.sites else NOTHING),
        "parameters": cell(record.model["parameters"], "{:,}".format),
        "parameters_after": cell(record.structure.get("after", {}).get("parameters"), "{:,}".format),
        "bytes_before": cell(stored["bytes_before"], size),
        "bytes_after": cell(stored["bytes_after"] if packed is None else packed, size),
        "seconds": cell(record.pruning_seconds(), _seconds),
        "seconds_in_all": cell(sum(record.seconds.values()), _seconds),
        "peak_memory": cell(max(record.peak_memory.values(), default=None), size),
    }


def _maps(record: RunRecord) -> dict[str, Any]:
    """Error and zeros by depth and site; experts' matrices of one kind together."""
    changed: Sequence[SiteRecord | Removal] = record.sites or record.removals
    maps = {"error": _grid((kind_of(_name(one)), one.block, one.error) for one in changed)}
    maps["zeros"] = _grid((kind_of(site.name), site.block, site.sparsity) for site in record.sites)
    maps["rounding"] = _grid((kind_of(one.name), one.block, one.error) for one in record.codes)
    return {name: grid for name, grid in maps.items() if grid["rows"]}


def _grid(values: Iterable[tuple[str, int, float | None]]) -> dict[str, Any]:
    """Means by row and block; None where a block has no such row, or nothing was measured of it."""
    found: dict[str, dict[int, list[float | None]]] = {}
    for row, block, value in values:
        found.setdefault(row, {}).setdefault(block, []).append(value)
    blocks = sorted({block for row in found.values() for block in row})
    cells = [[mean_known(row.get(block, ())) for block in blocks] for row in found.values()]
    return {"rows": _short(list(found)), "blocks": blocks, "values": cells}


def _name(one: SiteRecord | Removal) -> str:
    return one.name if isinstance(one, SiteRecord) else one.site


def _short(kinds: list[str]) -> list[str]:
    """Their last parts, where those tell them apart."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(last) else kinds


def _kept(removals: Sequence[Removal]) -> dict[str, Any] | None:
    """The share of heads and neurons that stayed, by depth."""
    grid = _grid((one.kind, one.block, one.kept / one.count) for one in removals)
    counts = {(one.kind, one.block): f"{one.kept:,} of {one.count:,}" for one in removals}
    texts = [[counts.get((kind, block), "") for block in grid["blocks"]] for kind in dict.fromkeys(r.kind for r in removals)]
    return grid | {"texts": texts} if removals else None


def _growth(changed: Sequence[SiteRecord | Removal]) -> dict[str, Any] | None:
    """Mean, least and largest error of each block's matrices."""
    by_block: dict[int, list[float]] = {}
    for one in changed:
        if one.error is not None:
            by_block.setdefault(one.block, []).append(one.error)
    errors = [by_block[block] for block in sorted(by_block)]
    parts = {"mean": [mean(own) for own in errors], "least": list(map(min, errors)), "largest": list(map(max, errors))}
    return {"blocks": sorted(by_block)} | parts if errors else None


def _fit(fits: Sequence[Reconstruction]) -> dict[str, Any] | None:
    """Each block's error before and after it was fitted to the dense block's output."""
    errors = {"before": [one.before for one in fits], "after": [one.after for one in fits]}
    return {"blocks": [one.block for one in fits]} | errors if fits else None


def _memory(record: RunRecord) -> dict[str, Any]:
    """What was measured, and what the preflight had expected."""
    rows = [
        [text_cell(f"peak, {place}"), cell(peak, size), text_cell("measured")] for place, peak in record.peak_memory.items()
    ]
    if record.predicted:
        parts = ("activations", "weights", "solving")
        rows += [[text_cell(part), cell(record.predicted[part], size), text_cell("expected, by formula")] for part in parts]
    return table(("memory", "bytes", "how it is known"), rows)


def _phase_memory(record: RunRecord) -> dict[str, Any]:
    """Each phase's peak, in MiB: on the device where that is a GPU, else of the process."""
    where = "device" if "device" in record.peak_memory else "process"
    found = {phase: peak[where] / 2**20 for phase, peak in record.phase_memory.items() if where in peak}
    return {"of": where, "mebibytes": found}


def _sizes(record: RunRecord, packed: int | None) -> dict[str, Any]:
    stored = record.size
    rows: list[tuple[str, float, float, Callable[[Any], str]]] = [
        (*change, "{:,}".format) for change in changes(record.structure, record.recipe)
    ]
    if record.sites:
        rows.append(("nonzero weights in pruned matrices", stored["nonzero_before"], stored["nonzero_after"], "{:,}".format))
    rows.append(
        (f"weight bytes{', zeros stored' if record.sites else ''}", stored["bytes_before"], stored["bytes_after"], size)
    )
    if bits := record.code_bits():
        rows.append(("bits a weight stored as a code, scales counted", 8 * record.codes[0].scale_bytes, bits, "{:.3f}".format))
    if packed is None:
        packed = stored.get("bytes_packed")
    if packed is not None:
        rows.append(("weight bytes, packed", stored["bytes_before"], packed, size))
    cells = [[text_cell(what), cell(a, show), cell(b, show), _change(a, b)] for what, a, b, show in rows]
    return table(("size", "before", "after", "left"), cells)


def _recovery(told: dict[str, Any]) -> dict[str, Any]:
    """What a training afterwards did."""
    aim = measure(told["arguments"], told["teacher"])
    trained = f"{told['tokens']:,} tokens of {told['text']}, {told['seconds']:,.0f} s"
    if "blocks" in told:
        return {"aim": f"{aim}, percent", "text": trained, "fit": _fit([Reconstruction(**one) for one in told["blocks"]])}
    curves = {name: told[name] for name in ("held_out", "trained")}
    return {"aim": f"{aim}, nats a token", "text": f"{trained}; step {told['best']} is the best", **curves}


def _timed(record: RunRecord) -> dict[str, Any] | None:
    """A speed that was asked for, predicted and measured."""
    rows = [list(map(text_cell, row)) for row in speed_rows(record.structure)]
    speed = record.structure.get("speed")
    where = f"{speed['device']}, {count(speed['threads'], 'thread')}, {speed['dtype']}" if speed else ""
    return table(("whole models, turn about", "dense", "smaller"), rows) | {"where": where} if rows else None


def _packed_bytes(run: Saved) -> int | None:
    """Bytes of all tensors of a packed folder."""
    if run.folder is None or not (run.folder / PACKED).is_file():
        return None
    return sum(info.nbytes for info in PackedFolder.open(run.folder).tensors.values())


def _speed(bench: Bench) -> dict[str, Any]:
    rows = [
        [
            text_cell(one["phase"]),
            cell(one["batch"], str),
            cell(one["tokens"] / one["dense"], "{:,.0f}".format),
            cell(one["tokens"] / one["packed"], "{:,.0f}".format),
            cell(one["dense"] / one["packed"], "{:.2f}x".format),
        ]
        for one in bench["model"]
    ]
    found = table(("phase", "batch", "dense, tokens/s", "packed, tokens/s", "speed-up"), rows)
    return found | {"where": f"{bench['device']}, {bench['dtype']}, {bench['date']}", "advice": bench["advice"]}


def _compared(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row a run."""
    facts = {
        "before": "perplexity_before",
        "after": "perplexity_after",
        "excess loss": "excess_loss",
        "zeros": "zeros",
        "weights": "bytes_after",
        "pruning": "seconds",
        "peak memory": "peak_memory",
    }
    rows = [
        [
            *(text_cell(run[what]) for what in ("label", "model", "asked", "method")),
            *(run["facts"][fact] for fact in facts.values()),
        ]
        for run in runs
    ]
    return table(("run", "model", "asked", "method", *facts), rows)


def _left_out(skipped: dict[str, str]) -> list[str]:
    reasons = dict.fromkeys(skipped.values())
    return [f"{sum(why == own for own in skipped.values())}: {why}" for why in reasons]


def _protocol(record: RunRecord) -> str:
    found = record.pruned
    return f"{count(found.windows, 'window')} of {found.length} tokens of {found.text}{found.computed()}" if found else ""


def _change(before: float, after: float) -> Cell:
    return cell(after / before if before else None, "{:.1%}".format)


def _figure(value: float) -> str:
    return f"{value:,.3f}" if value < 1e6 else f"{value:.3e}"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s"
