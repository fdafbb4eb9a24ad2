"""Perplexity: streamed equals whole, and both equal the formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_model, tokens
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.data.windows import Windows, evaluation_windows
from llmprune.job.record import Perplexity, excess_loss
from llmprune.measure import perplexity as measure
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import BUNDLED


def test_is_the_mean_token_loss_over_windows() -> None:
    model, ids = tiny_model("llama"), tokens(5, 12)
    losses = []
    for window in ids:
        with torch.no_grad():
            probabilities = model(window[None]).logits[0].log_softmax(-1)
        losses += [-float(probabilities[i, window[i + 1]]) for i in range(11)]
    measured = perplexity(model, Windows(ids, "t"))
    assert measured.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (measured.tokens, measured.windows, measured.length, measured.text) == (55, 5, 12, "t")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "mixtral", "bloom", "xlstm"])
@pytest.mark.parametrize("mask", [False, True])
def test_logits_in_pieces_are_those_at_once(family: str, mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few tokens of a batch of windows, in pieces that do not come out even; where the model cannot, all at once."""
    sizes = {"gemma2": {"final_logit_softcapping": 0.5}, "xlstm": {"num_heads": 2, "head_dim": None}}
    model, ids = tiny_model(family, **sizes.get(family, {})), tokens(5, 12)
    real = (torch.arange(12) < torch.tensor([12, 3, 7, 12, 5])[:, None]).long() if mask else None
    losses, made = [], []
    for number, window in enumerate(ids):
        with torch.no_grad():
            seen = {} if real is None else {"attention_mask": real[None, number]}
            probabilities = model(window[None], use_cache=False, **seen).logits[0].log_softmax(-1)
        losses += [-float(probabilities[i, window[i + 1]]) for i in range(11) if real is None or real[number, i + 1]]
    cross_entropy = functional.cross_entropy

    def count(logits: Tensor, *args: object, **options: object) -> Tensor:
        made.append(logits.numel())
        return cross_entropy(logits, *args, **options)

    monkeypatch.setattr(functional, "cross_entropy", count)
    monkeypatch.setattr(measure, "LOGITS", 3 * 5 * VOCABULARY)
    measured = perplexity(model, Windows(ids, "t", real))
    assert measured.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert measured.tokens == len(losses)
    whole = 5 * 11 * VOCABULARY
    pieces = [3 * 5 * VOCABULARY] * 3 + [2 * 5 * VOCABULARY]
    assert made == ([whole] if family == "xlstm" else pieces)


def test_streamed_equals_whole_before_and_after(family: str, saved, tmp_path: Path) -> None:
    """The run's own numbers are those of the loaded source and of the reloaded output."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    folder = saved(tiny_model(family, vocab_size=len(tokenizer)))
    result = llmprune.prune(
        folder, sparsity="2:4", calibration=tokens(4, 16), eval_text=str(text), tokenizer=tokenizer, output=tmp_path / "out"
    )
    windows = evaluation_windows(str(text), tokenizer, seqlen=64)
    for recorded, place in ((result.record.dense, folder), (result.record.pruned, tmp_path / "out")):
        whole = perplexity(AutoModelForCausalLM.from_pretrained(place).eval(), windows)
        assert recorded is not None
        assert recorded.value == pytest.approx(whole.value, rel=1e-6)
        assert recorded.windows == whole.windows
    assert result.record.dense.value != result.record.pruned.value


def test_excess_loss() -> None:
    dense, pruned = (Perplexity(value, "t", 1, 1, 2) for value in (10.0, 12.0))
    assert excess_loss(dense, pruned) == pytest.approx(math.log(1.2))
