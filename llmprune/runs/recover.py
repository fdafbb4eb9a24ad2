"""`llmprune recover`: train what pruning left of a model, its zeros kept, and write the result to a new folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmprune.base.errors import plain_errors
from llmprune.base.folders import check_room, publish
from llmprune.base.processes import joined
from llmprune.data.documents import GIVEN
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.job.recovery import BLOCKS, RecoverConfig
from llmprune.models.resolve import spelled
from llmprune.output.resume import continued
from llmprune.output.write import write_record
from llmprune.runs.recover_blocks import ByBlock
from llmprune.runs.recovery import Recovery, Way
from llmprune.runs.result import Result


def recover(model: str | Path, output: str | Path | None = None, *, progress: Progress | None = None, **options: Any) -> Result:
    """Train what is left of a pruned model; what is zero stays zero. Goes on from an unfinished run's last checkpoint.

    The best step by the loss on held-out windows of the training text is kept; where none is better than the beginning, the
    weights stay as they were.

    Args:
        model: a folder that llmprune wrote: weights pruned to any pattern, or heads, neurons or layers removed. Not packed.
        output: the folder to write; None: the model's name with `-recovered`.
        progress: what to show; nothing by default.
        options: the other fields of `RecoverConfig`.

    Raises:
        InputError: bad input, in one line; nothing has been written.
    """
    config = RecoverConfig.create({**options, "model": spelled(model), "output": None if output is None else str(output)})
    return _recover(config, progress or Progress(), in_place=False)


def recover_in_place(folder: Path, config: PruneConfig, progress: Progress, teacher: str | None) -> Result:
    """Train what a run of `config` has just pruned into `folder`, which the result replaces when it is whole; `teacher`: None
    stands for the model that was pruned."""
    text = "auto" if config.calibration == GIVEN else config.calibration
    options = {"tokens": config.recover, "text": text, "device": config.device, "output": str(folder)}
    options |= {"teacher": teacher, "eval_text": config.eval_text if teacher else "auto"}
    return _recover(RecoverConfig.create({"model": str(folder), **options}), progress, in_place=True)


def _way(task: Recovery) -> Way:
    if task.config.train == BLOCKS:
        return ByBlock(task)
    from llmprune.runs.recover_whole import Whole  # transformers' Trainer takes a second to import

    return Whole(task)


def _recover(config: RecoverConfig, progress: Progress, *, in_place: bool) -> Result:
    with plain_errors(), joined() as ranks:
        task = Recovery.begin(config, progress, ranks, in_place)
        way = _way(task)
        check_room(task.output, way.room())
        task.announce(str(way))
        with ExitStack() as unfinished:
            manifest = None
            if ranks.first:  # which alone writes
                going_on = continued(task.output, task.fingerprint(), config.restart, progress.note, way.begun)
                manifest = unfinished.enter_context(going_on)
            ranks.agree(None)
            way.run(manifest)
            if manifest:
                way.write(manifest.folder)
                write_record(manifest.folder, task.record, task.output.name)
                publish(manifest.folder, task.output, overwrite=config.overwrite or in_place)
        ranks.agree(None)  # the output is there when any process returns
        progress.recovered(task.record, task.output)
        return Result(task.record, None, task.output)
