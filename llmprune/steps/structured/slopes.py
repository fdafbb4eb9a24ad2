"""One backward pass over the calibration windows, block by block: how the loss depends on what each consumer reads.

The inputs of every block are kept (on disk, where activations are), so that one block's weights are enough at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.base.processes import Ranks
from llmprune.data.windows import IGNORED, Windows, next_token_labels
from llmprune.models.sites import Block, Site
from llmprune.stream.activations import Activations, Hidden
from llmprune.stream.capture import head


def loss_gradients(
    model: PreTrainedModel, blocks: Sequence[nn.Module], last: Activations, windows: Windows, device: torch.device
) -> list[Tensor]:
    """The gradient of the summed token loss in the last block's outputs, one tensor a batch of `last`.

    What is outside the blocks must be loaded.
    """
    each = windows.batches(1, device)
    found = []
    for hidden in last.hidden:
        rows = [_gradient(model, blocks, row.to(device), inputs) for row, inputs in zip(hidden.split(1), each, strict=False)]
        found.append(torch.cat(rows).to(hidden.device))
    return found


def _gradient(model: PreTrainedModel, blocks: Sequence[nn.Module], output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    output = output.detach().requires_grad_()
    (labels,) = next_token_labels(inputs)
    with torch.enable_grad():
        logits = head(model, blocks, output, **inputs)
        loss = functional.cross_entropy(logits[0, :-1].float(), labels, reduction="sum", ignore_index=IGNORED)
        return torch.autograd.grad(loss, output)[0]


def slopes(
    backward: Iterator[Block],
    feed: Activations,
    inputs: Sequence[Hidden],
    gradients: list[Tensor],
    consumers: Callable[[Block], list[Site]],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Sum over all tokens of a * dL/da for each input a of each consumer, (in,), by site name.

    Args:
        backward: the blocks from last to first, numbered as in `feed`.
        inputs: of each block, by number.
        gradients: of the loss in the last block's outputs; replaced by those in the first block's inputs.
    """
    found: dict[str, Tensor] = {}
    for block in backward:
        sites = consumers(block)
        sums = {site.name: torch.zeros(site.columns, device=site.weight.device) for site in sites}
        stream = feed.at(inputs[block.index])
        for index, gradient in enumerate(gradients):
            gradients[index] = stream.backward(block, index, gradient, sites, sums)
        for total in sums.values():
            ranks.add_up(total)
        found |= sums
    return found
