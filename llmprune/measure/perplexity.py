"""Perplexity by the papers' protocol: the mean token loss over disjoint windows of the concatenated split.

Each window stands alone, so its first token is context only. A perplexity means nothing without its text, its window
length and its tokenizer: results carry them. Not the same as lm-eval's word_perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.base.hardware import dtype_name
from llmprune.base.processes import Ranks
from llmprune.data.windows import IGNORED, Windows, next_token_labels
from llmprune.job.record import Perplexity
from llmprune.models.attention import fast_attention
from llmprune.models.discover import find_blocks
from llmprune.stream.activations import Activations
from llmprune.stream.capture import head, keeps_logits, last_output

LOGITS = 2**25  # that are made at once: 128 MiB in float32, and as much again for their logarithms
# Of a batch of windows of a whole model. What the bundled model took on one CPU thread, window by window : 1024 : 4096 tokens a
# batch: windows of 64 2.2 : 1.6 : 1.8 s in float32, 1.1 : .6 : .7 in bfloat16; of 512, 3.9 : 3.7 : 4.0 and 2.0 : 1.9 : 2.3.
_TOKENS = 1024


@torch.no_grad()
@fast_attention()
def perplexity(model: PreTrainedModel, windows: Windows) -> Perplexity:
    """Perplexity of a whole model in memory."""
    blocks, batch = list(find_blocks(model).values()), max(_TOKENS // windows.ids.shape[1], 1)
    batches = windows.batches(batch, model.device)
    return _measure(model, blocks, windows, ((inputs, last_output(model, blocks, **inputs)) for inputs in batches), Ranks())


@torch.no_grad()
@fast_attention()
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
    outputs = (row.to(device) for hidden in last.hidden for row in hidden.split(1))
    return _measure(model, blocks, windows, zip(windows.batches(1, device), outputs, strict=True), ranks)


def _measure(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    windows: Windows,
    batches: Iterable[tuple[dict[str, Tensor], Tensor]],
    ranks: Ranks,
) -> Perplexity:
    """From the model's inputs and its last block's outputs (batch, tokens, width), some windows at a time."""
    loss, predicted = torch.zeros((), dtype=torch.float64), 0
    for inputs, output in batches:
        labels = next_token_labels(inputs)
        for positions in torch.arange(labels.shape[1]).split(at_once(model, *labels.shape)):
            logits, wanted = head(model, blocks, output, positions, **inputs).flatten(0, 1), labels[:, positions].flatten()
            each = functional.cross_entropy(logits.float(), wanted, reduction="none", ignore_index=IGNORED)
            loss += each.cpu().double().sum()
        predicted += int((labels != IGNORED).sum())
    total, tokens, count = ranks.totals(float(loss), predicted, len(windows.ids))
    mean = total / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, windows.text, int(tokens), int(count), windows.ids.shape[1], dtype_name(model.dtype))


def at_once(model: PreTrainedModel, windows: int, tokens: int) -> int:
    """Of how many tokens of each of so many windows the logits are made at once."""
    if not keeps_logits(model):
        return tokens
    return max(LOGITS // (windows * model.config.get_text_config().vocab_size), 1)
