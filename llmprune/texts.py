"""Which texts a run calibrates and evaluates on, cut to what the model can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmprune.config import PruneConfig
from llmprune.data import Windows, calibration_windows, evaluation_windows, given_windows
from llmprune.errors import InputError

Given: TypeAlias = Tensor | Sequence[Mapping[str, Any]]  # calibration samples that the caller tokenised


@dataclass(frozen=True, slots=True)
class Texts:
    """`notes` say what was decided for the user, in plain lines."""

    calibration: Windows
    evaluation: Windows | None
    notes: tuple[str, ...]


def choose_texts(
    config: PruneConfig,
    model: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    given: Given | None,
    bundled: bool,
) -> Texts:
    """Load and cut the texts that `config` names; `auto` is pydoc for the bundled model, else c4 and no evaluation.

    Raises:
        InputError: a text is missing, too short or in tokens that the model does not have, or there is no tokenizer.
    """
    model = model.get_text_config()
    positions = getattr(model, "max_position_embeddings", None) or config.seqlen
    seqlen = min(config.seqlen, positions)
    notes = (f"seqlen {config.seqlen} is capped at the model's {positions} positions",) if seqlen < config.seqlen else ()
    if given is not None:
        calibration = given_windows(given)
    else:
        text = ("pydoc" if bundled else "c4") if config.calibration == "auto" else config.calibration
        tokenizer = _needed(tokenizer, text)
        calibration = calibration_windows(text, tokenizer, samples=config.samples, seqlen=seqlen, seed=config.seed)
    chosen = ("pydoc" if bundled else "none") if config.eval_text == "auto" else config.eval_text
    evaluation = None if chosen == "none" else evaluation_windows(chosen, _needed(tokenizer, chosen), seqlen=seqlen)
    for windows in filter(None, (calibration, evaluation)):
        if int(windows.ids.max()) >= model.vocab_size:
            raise InputError(
                f"token {int(windows.ids.max())} of {windows.text} is outside the model's vocabulary of {model.vocab_size}: "
                "is it another model's tokenizer?"
            )
    return Texts(calibration, evaluation, notes)


def _needed(tokenizer: PreTrainedTokenizerBase | None, text: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError(f"text {text} needs a tokenizer: pass tokenizer=..., or calibration as token ids")
    return tokenizer
