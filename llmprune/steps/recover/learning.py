"""What is trained of a pruned model, and towards what."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.data.windows import IGNORED, next_token_labels
from llmprune.models.discover import find_blocks
from llmprune.steps.recover.examples import LOGS, TOKENS, others


@dataclass(frozen=True, slots=True)
class Learning:
    """A model that is ready to be trained: gradients reach only what is to learn.

    Attributes:
        changed: the parameters that will differ, by name, as they are now.
        storage: the dtype that each is saved in.
        adapted: those of them that adapters stand for while they learn: (module, parameter's name in it).
    """

    model: PreTrainedModel
    changed: Mapping[str, Tensor]
    storage: Mapping[str, torch.dtype]
    adapted: Collection[tuple[nn.Module, str]] = ()

    def learned(self) -> Iterator[nn.Parameter]:
        """What gradients reach."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def settle(self) -> None:
        """Merge the adapters, and give all the values that they will have when they have been saved."""
        for module, name in self.adapted:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        for name in self.changed:
            parameter = self.model.get_parameter(name)
            parameter.copy_(parameter.to(self.storage[name]))

    @torch.no_grad()
    def restore(self) -> None:
        """Take back what was learned, after it was settled."""
        for name, before in self.changed.items():
            self.model.get_parameter(name).copy_(before)


def prepare(
    model: PreTrainedModel,
    train: str,
    pruned: Collection[str],
    storage: Mapping[str, torch.dtype],
    *,
    rank: int = 16,
    seed: int = 0,
) -> Learning:
    """Let parameters of the blocks learn: all where `train` is `kept`, those of one dimension (norms, biases) where it is
    `small`, adapters of the matrices where it is `lora`. What is zero in the parameters named `pruned` stays zero.

    Raises:
        InputError: there are none.
    """
    inside = _inside(model)
    model.requires_grad_(False)
    if train == "lora":
        chosen = {name: own for name, own in inside.items() if name in pruned or (not pruned and own.ndim == 2)}
    else:
        chosen = {name: own for name, own in inside.items() if train == "kept" or own.ndim == 1}
    if not chosen:
        raise InputError(f"the blocks of {type(model).__name__} have no norms or biases to train: use --train kept")
    changed = {name: own.detach().to("cpu", storage[name], copy=True) for name, own in chosen.items()}
    if train == "lora":
        generator = torch.Generator().manual_seed(seed)
        adapted = [_adapt(model, name, _Adapter(own, rank, generator)) for name, own in chosen.items()]
        return Learning(model, changed, storage, adapted)
    for name, parameter in chosen.items():
        parameter.requires_grad_()
        if name in pruned:
            parameter.register_hook(_Masked(parameter.detach() != 0))
    return Learning(model, changed, storage)


@torch.no_grad()
def rewind(model: PreTrainedModel, earlier: PreTrainedModel, pruned: Collection[str]) -> None:
    """Set the parameters of the blocks back to those of `earlier`, a checkpoint from the dense model's training; zeros of those
    named `pruned` stay.

    Source: Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", 2020, which sets back all parameters.

    Raises:
        InputError: it is a model of other blocks.
    """
    now, then = _inside(model), _inside(earlier)
    shapes, earlier_shapes = ({name: tuple(own.shape) for name, own in found.items()} for found in (now, then))
    if shapes != earlier_shapes:
        name = min(name for name in {**shapes, **earlier_shapes} if shapes.get(name) != earlier_shapes.get(name))
        own, other = (" x ".join(map(str, found.get(name, ("not there",)))) for found in (shapes, earlier_shapes))
        raise InputError(f"rewind is to another model: its {name} is {other}, here it is {own}")
    for name, parameter in now.items():
        kept = (parameter != 0) if name in pruned else True
        parameter.copy_(then[name] * kept)


def _inside(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of the blocks."""
    return {
        f"{block}.{name}": parameter
        for block, module in find_blocks(model).items()
        for name, parameter in module.named_parameters()
    }


class _Masked:
    """A hook that drops the gradient where the weight is pruned: so the moments of an optimiser that starts from nothing are
    zero there at every step, and the weight stays zero."""

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self._kept


class _Adapter(nn.Module):
    """W + M * (B A): a product of low rank under the mask M of what is kept, so that merging it loses nothing (Zimmer et al.,
    "PERP", 2023). B starts at zero. W is (rows, columns), or of experts (experts, rows, columns)."""

    kept: Tensor

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *experts, rows, columns = weight.shape
        down = torch.randn(*experts, rank, columns, generator=generator) / math.sqrt(columns)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(*experts, rows, rank, device=weight.device))
        self.register_buffer("kept", weight.detach() != 0, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down) * self.kept


def _adapt(model: PreTrainedModel, name: str, adapter: _Adapter) -> tuple[nn.Module, str]:
    """Put an adapter before a parameter."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, own, adapter)
    return module, own


@dataclass(frozen=True, slots=True)
class Aim:
    """What is imitated: `share` of the loss is the divergence from `teacher`, or where that is None from what examples keep of
    its predictions; the rest is the cross-entropy of the text."""

    teacher: nn.Module | None = None
    share: float = 0.0


def losses(model: nn.Module, aim: Aim, inputs: Mapping[str, Tensor]) -> Tensor:
    """Mean over the tokens that are predicted, of KL(teacher || model) and cross-entropy as `aim` has them; nats a token. Where
    only the teacher's likeliest tokens are kept, all others count as one.

    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, at temperature 1.
    """
    labels = next_token_labels(inputs).flatten()
    real = labels != IGNORED
    logits = _predicted(model, inputs)[real]
    loss = logits.new_zeros(())
    if aim.share < 1:
        loss = loss + (1 - aim.share) * functional.cross_entropy(logits, labels[real])
    if aim.share > 0:
        own = functional.log_softmax(logits, dim=-1)
        if aim.teacher is not None:
            with torch.no_grad():
                target = functional.log_softmax(_predicted(aim.teacher, inputs)[real], dim=-1)
        else:
            tokens, logs = (inputs[name].flatten(0, 1)[real] for name in (TOKENS, LOGS))
            own = torch.cat([own.gather(-1, tokens.long()), others(logits, tokens)], dim=-1)
            target = functional.log_softmax(logs.float(), dim=-1)  # they sum to one again, after rounding
        loss = loss + aim.share * functional.kl_div(own, target, reduction="batchmean", log_target=True)
    return loss


def _predicted(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (tokens, vocabulary) in float32, of all positions but each window's last."""
    asked = {name: own for name, own in inputs.items() if name not in (TOKENS, LOGS)}
    logits: Tensor = model(**asked, use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).float()
