"""Pruning and training in turns: each sparsity is pruned to from what the one before was trained to; then rounded, if asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from llmprune.base.errors import InputError
from llmprune.base.folders import publish
from llmprune.job.naming import output_folder
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.job.record import RunRecord
from llmprune.models.resolve import look_up
from llmprune.output.resume import turn_folder
from llmprune.output.write import write_record
from llmprune.reports.saved import read_runs
from llmprune.runs.checks import finished, untrained
from llmprune.runs.pruned import on_its_texts
from llmprune.runs.result import Result

Once = Callable[[PruneConfig, "str | None"], Result]  # prune and train by a configuration of one turn, towards a teacher


def prune_in_turns(config: PruneConfig, progress: Progress, once: Once) -> Result:
    """Do one turn after the other, each in a hidden folder beside the output; the last one's becomes the output. Goes on after
    the turns that an earlier run has finished, and within one.

    Raises:
        InputError: an unfinished run of other settings is there.
    """
    output = output_folder(config, look_up(config.model).name)
    assert output is not None  # recover asks for one
    turns: list[str | None] = [*config.turns] or [None]
    folders = [turn_folder(output, number) for number in range(1, 1 + len(turns) + bool(config.bits))]
    if config.restart:
        _clear(folders)
    records: list[RunRecord] = []
    for number, (sparsity, folder) in enumerate(zip(turns, folders, strict=False)):
        own = _turn(config, sparsity, folder, folders[:number], records)
        done = finished(own) is not None
        if folder.exists() and not done and untrained(own) is None:
            raise InputError(
                f"{folder} is of an unfinished run with other settings: repeat them, or pass --restart to begin anew"
            )
        if len(turns) > 1:
            progress.note(f"turn {number + 1} of {len(turns)}: {sparsity}")
        if not done:
            once(own, config.model if records else None)
        records.append(read_runs([str(folder)])[0].record)
    whole = _joined(config, records)
    if config.bits:
        _quantise(config, folders, whole, records[0], once)
    write_record(folders[-1], whole, output.name)
    publish(folders[-1], output, overwrite=config.overwrite)
    _clear(folders)
    progress.recovered(whole, output)
    return Result(whole, None, output)


def _quantise(config: PruneConfig, folders: Sequence[Path], whole: RunRecord, first: RunRecord, once: Once) -> None:
    """Round what the last turn came to, into the last folder, and tell the record."""
    own = replace(config, model=str(folders[-2]), overwrite=False, restart=False, push_to_hub=None)
    own = on_its_texts(own.quantise_only(folders[-1]), first)
    if finished(own) is None:
        once(own, None)
    found = read_runs([str(folders[-1])])[0].record
    told = {name: value for name, value in found.rounding.items() if name != "arguments"}
    whole.codes, whole.pruned, whole.rounding = found.codes, found.pruned, told
    whole.dense = whole.dense if found.pruned else None


def _turn(
    config: PruneConfig, sparsity: str | None, folder: Path, before: Sequence[Path], records: Sequence[RunRecord]
) -> PruneConfig:
    """What a turn is asked for; those after the first prune weights alone, with the first one's texts and on its channels."""
    own = config.unquantised()
    own = replace(own, sparsity=sparsity, output=str(folder), overwrite=False, restart=False, push_to_hub=None)
    if not records:
        return own
    own = replace(own, model=str(before[-1]), rotate=False, permute=False if ":" in (sparsity or "") else None)
    return on_its_texts(own.weights_only(folder), records[0])


def _joined(config: PruneConfig, records: Sequence[RunRecord]) -> RunRecord:
    """The last turn's record, which starts where the first began."""
    first, last = records[0], records[-1]
    dense, nonzero = last.dense, first.size["nonzero_before"]  # the teacher's, by the last training
    last.follow(first)
    last.arguments, last.dense, last.size["nonzero_before"] = asdict(config), dense, nonzero
    last.recoveries = [told for own in records for told in own.recoveries]
    phases = dict.fromkeys(phase for own in records for phase in own.seconds)
    last.seconds = {phase: sum(own.seconds.get(phase, 0.0) for own in records) for phase in phases}
    return last


def _clear(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
