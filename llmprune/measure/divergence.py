"""How far models are from the dense one in what they predict: KL(dense || model), in nats a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.base.processes import Ranks
from llmprune.data.windows import IGNORED, Windows, next_token_labels
from llmprune.measure.perplexity import at_once
from llmprune.models.attention import fast_attention
from llmprune.stream.activations import Activations
from llmprune.stream.capture import head


@torch.no_grad()
@fast_attention()
def streamed_divergences(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    dense: Activations,
    others: Sequence[Activations],
    windows: Windows,
    device: torch.device,
    ranks: Ranks,
) -> list[float]:
    """Of models whose blocks have already run, all with the head of `model`: `dense` and each of `others` hold the last block's
    outputs for `windows`, which are this process's share of the text. Counts the tokens that perplexity counts.
    """
    sums, predicted = [0.0] * len(others), 0
    rows = zip(_rows(dense, device), *(_rows(other, device) for other in others), strict=True)
    for inputs, (wanted, *found) in zip(windows.batches(1, device), rows, strict=True):
        labels = next_token_labels(inputs)
        for positions in torch.arange(labels.shape[1]).split(at_once(model, *labels.shape)):
            real = (labels[:, positions] != IGNORED).flatten()

            predictions = (
                functional.log_softmax(head(model, blocks, output, positions, **inputs).flatten(0, 1)[real].float(), dim=-1)
                for output in (wanted, *found)
            )
            target = next(predictions)
            for index, own in enumerate(predictions):
                sums[index] += float(functional.kl_div(own, target, reduction="sum", log_target=True))
        predicted += int((labels != IGNORED).sum())
    *totals, tokens = ranks.totals(*sums, predicted)
    return [max(total, 0.0) / max(tokens, 1) for total in totals]


def _rows(last: Activations, device: torch.device) -> Iterator[Tensor]:
    """Window by window, (1, tokens, width)."""
    return (row.to(device) for hidden in last.hidden for row in hidden.split(1))
