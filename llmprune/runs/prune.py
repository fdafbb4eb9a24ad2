"""One run: what is asked, as steps in order, each from a folder to a folder; or the one step on a model in memory."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.base.errors import InputError, plain_errors
from llmprune.base.files import PACKED, RECORD, check_record
from llmprune.base.folders import publish
from llmprune.base.hardware import pick_device, pick_dtype
from llmprune.base.processes import joined
from llmprune.data.documents import GIVEN
from llmprune.data.windows import Given
from llmprune.job.job import Job
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.job.record import RunRecord
from llmprune.models.resolve import ModelFolder, resolve, spelled
from llmprune.models.skeleton import find_tokenizer, load_config, load_model
from llmprune.output.resume import continued
from llmprune.reports.saved import read_runs
from llmprune.runs.announce import claim_output
from llmprune.runs.checks import check_folders, check_names, check_recovery, finished, untrained
from llmprune.runs.in_memory import FROM_FOLDER, prune_in_memory
from llmprune.runs.pruned import on_its_texts
from llmprune.runs.pushing import check_push, push_output
from llmprune.runs.recover import recover_in_place
from llmprune.runs.result import Result
from llmprune.runs.schedule import schedule
from llmprune.runs.turns import prune_in_turns


def prune(
    model: str | Path | PreTrainedModel,
    *,
    calibration: str | Path | Given = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Prune a causal language model after training.

    Args:
        model: a model in memory, which is pruned in place; or a bundled name, a folder or a Hub id. With `output`, those
            are streamed from disk to disk with one block's weights in memory; without, they are loaded whole. Heads, neurons
            and layers are removed from folder to folder only.
        calibration: the name of a text, as on the command line; or token windows: ids (windows, length), or mappings of
            `input_ids` and `attention_mask`, padding marked 0.
        tokenizer: for a model in memory and calibration text.
        progress: what to show; nothing by default.
        options: the fields of `PruneConfig`: `sparsity`, or `heads`, `neurons`, `layers`, and how.

    Raises:
        InputError: bad input, in one line; nothing has been written.
    """
    if not isinstance(model, (str, Path, PreTrainedModel)):
        raise InputError(f"model must be a transformers model, a folder or a name, not {type(model).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}")
    given = None if isinstance(calibration, (str, Path)) else calibration
    named = {
        "model": type(model).__name__ if isinstance(model, PreTrainedModel) else spelled(model),
        "calibration": str(calibration) if given is None else GIVEN,
    }
    config = PruneConfig.create({**options, **named})
    check_names(config)
    if not isinstance(model, PreTrainedModel):
        check_folders(config)
    shown = progress or Progress()

    def once(own: PruneConfig, teacher: str | None = None) -> Result:
        with joined() as ranks, torch.no_grad():
            job = Job(own, given, shown, ranks)
            check_push(own, first=ranks.first)
            check_recovery(own, in_memory=isinstance(model, PreTrainedModel), processes=ranks.size)
            with job.clock:
                result = _prune(job, model if isinstance(model, PreTrainedModel) else own.model, tokenizer)
        if own.recover is not None and result.output is not None:
            result = recover_in_place(result.output, own, shown, teacher)
        if ranks.first:
            push_output(own, shown, result.output)  # the others do not wait for it
        return result

    with plain_errors():
        if len(config.turns) < 2 and not (config.recover and config.bits):
            return once(config)
        check_push(config, first=True)
        result = prune_in_turns(config, shown, once)
        push_output(config, shown, result.output)
        return result


def quantise(model: str | Path, output: str | Path, *, progress: Progress | None = None, **options: Any) -> Result:
    """Round the weights of a model to codes of few bits; what is zero stays zero. Streams, and goes on from an unfinished run's
    last block.

    Args:
        model: a folder that llmprune pruned, not packed; or any other, a bundled name or a Hub id.
        output: the folder to write, or `auto`.
        progress: what to show; nothing by default.
        options: fields of `PruneConfig`: `bits` (default 4), `group_size`, `rounding`, and those that say how to calibrate and
            compute. Texts are by default those of the run that pruned the model.

    Raises:
        InputError: bad input, in one line; nothing has been written.
    """
    config = PruneConfig.create({"bits": 4, **options, "model": spelled(model), "output": str(output)})
    check_names(config)
    source = resolve(config.model)
    if (earlier := _made_by(source)) is not None:
        config = on_its_texts(config, earlier)
    if (done := finished(config)) is not None:
        (progress or Progress()).note(f"{done[0]} is complete: an earlier run of this command wrote it")
        return Result(read_runs([str(done[0])])[0].record, None, done[0])
    return prune(progress=progress, **asdict(config))


def _prune(job: Job, model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Result:
    """In memory or from folder to folder, by where the model is and what is asked."""
    folder: ModelFolder | None = None
    why = ""  # a model in memory has its own dtype
    if not isinstance(model, PreTrainedModel):
        folder = resolve(job.config.model)
        tokenizer = tokenizer or find_tokenizer(folder.path)
        if job.config.structured or job.config.budgets or job.config.bits or job.config.output is not None:
            return _prune_folder(job, folder, tokenizer)
        config, device = load_config(folder.path), pick_device(job.config.device, job.ranks.local)
        dtype, why = job.ranks.agree(pick_dtype(job.config.dtype, device, config))
        model = load_model(folder.path, config, device, dtype)
    record, output = prune_in_memory(job, model, folder, tokenizer, why)
    return Result(record, model, output)


def _made_by(source: ModelFolder) -> RunRecord | None:
    """The record of the run that made it, if one did."""
    return read_runs([str(source.path)])[0].record if (source.path / RECORD).is_file() else None


def _prune_folder(job: Job, source: ModelFolder, tokenizer: PreTrainedTokenizerBase | None) -> Result:
    """Each step reads a folder and writes one beside the output; that of the last gets the output's name. Where weights are
    only rounded, the record begins as that of the run which made the folder."""
    output = job.output(source.name)
    if (pruned := untrained(job.config)) is not None:
        job.progress.note(f"{pruned} was pruned by an earlier run")
        return Result(read_runs([str(pruned)])[0].record, None, pruned)
    if output is None:
        raise InputError(FROM_FOLDER + "name an output folder")
    claim_output(job, output, source.path)
    record = None if job.config.sparse or job.config.structured else _made_by(source)
    if record is not None and not (source.path / PACKED).is_file():  # which is refused below
        check_record(source.path, "quantise it", ".safetensors")
    place, manifest = source, None
    with ExitStack() as unfinished:
        for stage in schedule(job, output):
            step = stage.begin(place, tokenizer)
            if manifest is None and job.ranks.first:  # which alone writes
                manifest = unfinished.enter_context(
                    continued(output, step.fingerprint(), job.config.restart, job.progress.note)
                )
            record = step.run(record, manifest)
            place = replace(place, path=stage.into)
        if manifest:
            publish(place.path, output, overwrite=job.config.overwrite)
    assert record is not None  # a run has a step
    job.ranks.agree(None)  # the output is there when any process returns
    job.progress.summary(record, output)
    return Result(record, None, output)
