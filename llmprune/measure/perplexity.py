"""Perplexity by the papers' protocol: the mean token loss over disjoint windows of the concatenated split.

Each window stands alone, so its first token is context only. A perplexity means nothing without its text, its window
length and its tokenizer: results carry them. Not the same as lm-eval's word_perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.base.hardware import dtype_name
from llmprune.base.processes import Ranks
from llmprune.data.windows import IGNORED, Windows, next_token_labels
from llmprune.job.record import Perplexity
from llmprune.stream.activations import Activations
from llmprune.stream.capture import head


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Windows) -> Perplexity:
    """Perplexity of a whole model in memory."""
    return _measure(
        model, windows, lambda inputs: model(**inputs, use_cache=False, return_dict=True).logits, model.device, Ranks()
    )


@torch.no_grad()
def streamed_perplexity(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    last: Activations,
    windows: Windows,
    device: torch.device,
    ranks: Ranks,
) -> Perplexity:
    """Perplexity of a model whose blocks have already run: `last` holds the last block's outputs for `windows`, which are
    this process's share of the text.
    """
    outputs = iter(row for hidden in last.hidden for row in hidden.split(1))
    return _measure(model, windows, lambda inputs: head(model, blocks, next(outputs).to(device), **inputs), device, ranks)


def _measure(
    model: PreTrainedModel, windows: Windows, logits: Callable[[dict[str, Tensor]], Tensor], device: torch.device, ranks: Ranks
) -> Perplexity:
    loss, predicted = torch.zeros((), dtype=torch.float64), 0
    for inputs in windows.batches(1, device):  # logits are large: one window at a time
        labels = next_token_labels(inputs)
        each = functional.cross_entropy(logits(inputs)[0, :-1].float(), labels, reduction="sum", ignore_index=IGNORED)
        loss += each.double().cpu()
        predicted += int((labels != IGNORED).sum())
    total, tokens, count = ranks.totals(float(loss), predicted, len(windows.ids))
    mean = total / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, windows.text, int(tokens), int(count), windows.ids.shape[1], dtype_name(model.dtype))
