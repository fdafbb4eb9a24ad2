"""What a pruned folder says of where it came from: its record, its dense model, the text that it was evaluated on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmprune.base.errors import InputError
from llmprune.base.files import PACKED, RECORD
from llmprune.data.documents import GIVEN
from llmprune.job.options import PruneConfig
from llmprune.job.record import RunRecord
from llmprune.job.recovery import RecoverConfig
from llmprune.models.resolve import ModelFolder, look_up, resolve
from llmprune.models.skeleton import Skeleton, find_tokenizer, load_config
from llmprune.reports.saved import read_runs


def pruned_record(folder: Path) -> RunRecord:
    """The record of the run that pruned the model.

    Raises:
        InputError: the folder was not pruned by llmprune, or is packed.
    """
    if not folder.is_dir():
        raise InputError(f"model {folder} is no folder: name one that llmprune wrote")
    if (folder / PACKED).is_file():
        raise InputError(f"{folder} is packed: recover the folder that it was packed from, or `llmprune unpack` it first")
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} holds no {RECORD}: recover trains what llmprune pruned")
    return read_runs([str(folder)])[0].record


def pruned_parameters(skeleton: Skeleton, record: RunRecord) -> set[str]:
    """The model's parameters that hold pruned matrices."""
    pruned = {site.name for site in record.sites}
    return {site.parameter for block in skeleton.describe() for site in block.sites if site.name in pruned}


def evaluated_on(config: RecoverConfig, record: RunRecord) -> str | None:
    """The text that perplexity is measured on."""
    if config.eval_text == "auto":
        return record.pruned.text if record.pruned else None
    return None if config.eval_text == "none" else config.eval_text


def on_its_texts(config: PruneConfig, record: RunRecord) -> PruneConfig:
    """With the texts that a run had been given, where `config` names none."""
    texts = {"calibration": record.calibration["text"], "eval_text": record.pruned.text if record.pruned else "none"}
    known = {name: text for name, text in texts.items() if getattr(config, name) == "auto" and text != GIVEN}
    return replace(config, **known)


def of_bundled(record: RunRecord) -> bool:
    """Whether the bundled model was pruned."""
    try:
        found = look_up(record.arguments["model"])
    except InputError:
        return False
    return isinstance(found, ModelFolder) and found.bundled


def dense_model(config: RecoverConfig, record: RunRecord) -> ModelFolder:
    """The dense model."""
    if config.teacher is not None:
        return resolve(config.teacher)
    model = record.model
    if model["name"] == model["class"]:
        raise InputError("the model that was pruned was one in memory: name its dense twin with --teacher")
    named = f"{model['hub_id']}@{model['commit']}" if model["hub_id"] and model["commit"] else record.arguments["model"]
    try:
        return resolve(named)
    except InputError as error:
        raise InputError(f"the dense model is not where it was ({error}): name it with --teacher") from None


def check_teacher(teacher: ModelFolder, vocabulary: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: InputError: it predicts other tokens."""
    own = load_config(teacher.path).get_text_config().vocab_size
    if own != vocabulary:
        raise InputError(
            f"teacher {teacher.name} has a vocabulary of {own} tokens, the model one of {vocabulary}: name its own"
        )
    other = find_tokenizer(teacher.path)
    if other is not None and other.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"teacher {teacher.name} has another tokenizer than the model: name the model's own dense twin")
