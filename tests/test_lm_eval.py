"""What llmprune writes runs through lm-eval as any other model does."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.models.resolve import resolve

PAIRS = [("Return the length of", " the list"), ("This function raises", " ValueError"), ("", "import os")]
TEXT = "The open function returns a file object, and is most commonly used with two arguments."


def requests(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=number) for number, each in enumerate(arguments)]


@pytest.mark.parametrize("options", [{"heads": "25%", "neurons": "25%"}, {"neurons": "25%", "per_layer": True}])
def test_a_smaller_model_through_lm_eval(options: dict, tmp_path: Path) -> None:
    """Against log-likelihoods taken from the model itself."""
    folder = tmp_path / "out"
    options = options | {"samples": 8, "seqlen": 128, "eval_text": "none"}
    llmprune.prune("llama", output=folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = llmprune.load(folder, device="cpu", dtype="float32")
    named = {"pretrained": own, "tokenizer": tokenizer} if "per_layer" in options else {"pretrained": str(folder)}
    harness = HFLM(device="cpu", batch_size=4, dtype="float32", **named)
    rolling = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True)[0]
    ids = torch.tensor([[harness.prefix_token_id, *tokenizer.encode(TEXT)]])
    with torch.no_grad():
        scores = log_softmax(own(input_ids=ids).logits[0, :-1].double(), dim=-1)
    expected = float(scores.gather(1, ids[0, 1:, None]).sum())
    assert rolling == pytest.approx(expected, rel=1e-4)
    found = harness.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert all(math.isfinite(value) and value < 0 for value, _ in found)
    dense = AutoModelForCausalLM.from_pretrained(resolve("llama").path)
    assert own.num_parameters() < dense.num_parameters()
