"""What is trained of a pruned model, and towards what."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.data.windows import IGNORED, next_token_labels
from llmprune.models.discover import find_blocks


def trainable(model: PreTrainedModel, train: str) -> dict[str, nn.Parameter]:
    """The parameters of the blocks: all where `train` is `kept`, those of one dimension (norms, biases) where it is `small`.

    Raises:
        InputError: there are none.
    """
    found = {
        f"{block}.{name}": parameter
        for block, module in find_blocks(model).items()
        for name, parameter in module.named_parameters()
        if train == "kept" or parameter.ndim == 1
    }
    if not found:
        raise InputError(f"the blocks of {type(model).__name__} have no norms or biases to train: use --train kept")
    return found


def freeze_all_but(model: PreTrainedModel, trained: Collection[nn.Parameter]) -> None:
    """Let gradients reach only what is to be trained."""
    own = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


def keep_zeros(trained: Mapping[str, nn.Parameter], pruned: Collection[str]) -> None:
    """Let what is zero in the parameters named `pruned` stay zero: its gradient is zero at every step, and so are the moments
    of an optimiser that starts from nothing."""
    for name, parameter in trained.items():
        if name in pruned:
            parameter.register_hook(_Masked(parameter.detach() != 0))


class _Masked:
    """A hook that drops the gradient where the weight is pruned."""

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self._kept.to(gradient.device)


def losses(model: nn.Module, teacher: nn.Module | None, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean over the tokens that are predicted: KL(teacher || model) or, without a teacher, the cross-entropy; nats a token.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, at temperature 1.
    """
    logits = _predicted(model, inputs)
    labels = next_token_labels(inputs).flatten()
    if teacher is None:
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    with torch.no_grad():
        target = functional.log_softmax(_predicted(teacher, inputs), dim=-1)
    real = labels != IGNORED
    own = functional.log_softmax(logits, dim=-1)
    return functional.kl_div(own[real], target[real], reduction="batchmean", log_target=True)


def _predicted(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (tokens, vocabulary) in float32, of all positions but each window's last."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).float()
