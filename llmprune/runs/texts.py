"""Which texts a run calibrates and evaluates on, cut to what the model can take."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmprune.base.errors import InputError
from llmprune.base.words import count
from llmprune.data.windows import Given, Texts, calibration_windows, evaluation_windows, given_windows
from llmprune.job.options import PruneConfig


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
    if seqlen < 2:
        raise InputError(f"the model's configuration allows {count(positions, 'position')}, too few for a window")
    notes = (
        (f"seqlen {config.seqlen} is capped at the model's {count(positions, 'position')}",) if seqlen < config.seqlen else ()
    )
    if given is not None:
        calibration, notes = given_windows(given), ()
        if calibration.ids.shape[1] > positions:
            given_ones = f"calibration windows of {count(calibration.ids.shape[1], 'token')}"
            raise InputError(f"{given_ones} exceed the model's {count(positions, 'position')}")
    else:
        text = ("pydoc" if bundled else "c4") if config.calibration == "auto" else config.calibration
        tokenizer = _needed(tokenizer, text)
        calibration = calibration_windows(text, tokenizer, samples=config.samples, seqlen=seqlen, seed=config.seed)
    chosen = ("pydoc" if bundled else "none") if config.eval_text == "auto" else config.eval_text
    evaluation = None if chosen == "none" else evaluation_windows(chosen, _needed(tokenizer, chosen), seqlen=seqlen)
    for windows in filter(None, (calibration, evaluation)):
        for token in (int(windows.ids.min()), int(windows.ids.max())):
            if not 0 <= token < model.vocab_size:
                raise InputError(
                    f"token {token} of {windows.text} is outside the model's vocabulary of {model.vocab_size}: "
                    "is it another model's tokenizer?"
                )
    return Texts(calibration, evaluation, notes)


def _needed(tokenizer: PreTrainedTokenizerBase | None, text: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError(
            f"text {text} needs a tokenizer: put the model's tokenizer files into its folder, or in Python pass tokenizer=... "
            "or calibration as token ids"
        )
    return tokenizer
