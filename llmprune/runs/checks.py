"""What a run can refuse, or find done already, before torch is imported: names, the model's and the output's folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmprune.base.errors import InputError, unknown
from llmprune.base.files import RECORD, read_record
from llmprune.base.folders import check_output
from llmprune.data.documents import names_a_file
from llmprune.job.naming import output_folder
from llmprune.job.options import PruneConfig
from llmprune.job.recipes import choose_recipe
from llmprune.job.recovery import RecoverConfig
from llmprune.models.resolve import ModelFolder, look_up
from llmprune.solvers import METHODS
from llmprune.steps.quantise.rounding import ROUNDINGS
from llmprune.steps.structured.scores import SCORES
from llmprune.steps.weights.allocate import ALLOCATORS


def check_names(config: PruneConfig) -> None:
    """Raises: InputError: there is no such method, preset, target or score."""
    for kind, name, known in (
        ("method", choose_recipe(config).method, METHODS.names()),
        ("score", config.score, SCORES.names()),
        ("allocation", config.allocate, ALLOCATORS.names()),
        ("rounding", config.rounding, ROUNDINGS.names()),
    ):
        if name not in known:
            raise unknown(kind, name, known)


def check_recovery(config: PruneConfig, *, in_memory: bool, processes: int) -> None:
    """Refuse training that cannot follow the pruning, before that.

    Raises:
        InputError: there is a reason.
    """
    if config.recover is None:
        return
    if in_memory:
        raise InputError("recover trains from folder to folder: pass the model's folder or Hub id, and an output")
    if processes > 1:
        raise InputError("recover trains in one process: prune without it, then `llmprune recover` the output")
    if config.calibration == config.eval_text and names_a_file(config.calibration):
        raise InputError(f"recover would train on {config.calibration}, which perplexity is measured on: name two texts")
    RecoverConfig(model=config.model, tokens=config.recover)  # enough for a step


def check_folders(config: PruneConfig) -> None:
    """Look at the model's name and the output folder.

    Raises:
        InputError: the model is no name or folder, or the output would cost the user something.
    """
    found = look_up(config.model)
    output = output_folder(config, found.name)
    if output is not None and untrained(config) is None:
        check_output(output, found.path if isinstance(found, ModelFolder) else None, config.overwrite)


def untrained(config: PruneConfig) -> Path | None:
    """The output folder, where an earlier run of the same options has pruned the model into it, and was to train it next."""
    if config.recover is None or (found := _written(config)) is None:
        return None
    output, record = found
    return None if record.get("recoveries") else output


def finished(config: PruneConfig) -> tuple[Path, dict[str, Any]] | None:
    """The output folder and its record, where an earlier run of the same options has done all, and nothing was added."""
    found = _written(config)
    return None if found is None or (config.recover is not None and not found[1].get("recoveries")) else found


def _written(config: PruneConfig) -> tuple[Path, dict[str, Any]] | None:
    output = output_folder(config, look_up(config.model).name)
    if config.overwrite or output is None or not (output / RECORD).is_file():
        return None
    try:
        record, files = read_record(output)
        arguments = record.get("arguments")
        if not (config.sparse or config.structured):  # of the run that made what was rounded
            arguments = record.get("rounding", {}).get("arguments", arguments)
        if not isinstance(arguments, dict):
            return None
        earlier = PruneConfig.recorded(arguments)
    except InputError:
        return None
    whole = {path.name for path in output.iterdir()} == {RECORD, *(name.partition("/")[0] for name in files)}
    return (output, record) if whole and _deciding(earlier) == _deciding(config) else None


def _deciding(config: PruneConfig) -> PruneConfig:
    """Without what does not bear on the model that is written."""
    return replace(config, overwrite=False, restart=False, push_to_hub=None)
