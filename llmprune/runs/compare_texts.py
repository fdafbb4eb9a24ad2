"""What all cells of a comparison share: the text that they are evaluated on, and the dense model's perplexity there."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.base.hardware import pick_device
from llmprune.data.windows import Windows, evaluation_windows
from llmprune.job.record import Perplexity
from llmprune.measure.perplexity import perplexity
from llmprune.models.skeleton import load_config, load_model, load_tokenizer


def load_float32(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """The whole model in float32."""
    return load_model(folder, load_config(folder), pick_device(device), torch.float32)


@functools.cache
def evaluation(
    folder: Path, windows: int | None, text: str = "pydoc", seqlen: int = 512
) -> tuple[PreTrainedTokenizerBase, Windows]:
    """The model's tokenizer, and the first windows of a text's evaluation split."""
    tokenizer = load_tokenizer(folder)
    found = evaluation_windows(text, tokenizer, seqlen=seqlen)
    return tokenizer, Windows(found.ids[:windows], found.text)


@functools.cache
def dense_perplexity(
    folder: Path, windows: int | None, text: str = "pydoc", seqlen: int = 512, device: str = "cpu"
) -> Perplexity:
    return perplexity(load_float32(folder, device), evaluation(folder, windows, text, seqlen)[1])
