"""Record what a model's own forward hands to each decoder block, and run its head on given block outputs.

Every block's `forward` is replaced by one that passes its hidden states through, so the model computes its embeddings,
masks and position encodings itself, for each block separately (they differ under mixed attention), and the blocks'
weights need not be loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.base.errors import InputError

_HIDDEN = "hidden_states"


@dataclass(frozen=True, slots=True)
class Call:
    """How the model calls a block: all arguments but the hidden states, and whether those came by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's output hidden states for `hidden` (batch, tokens, width); some blocks wrap them in a tuple."""
        if self.by_name:
            out = block(*self.args, **self.kwargs, **{_HIDDEN: hidden})
        else:
            out = block(hidden, *self.args, **self.kwargs)
        return _hidden(out)


def _hidden(out: Any) -> Tensor:
    """The hidden states of what a block returns."""
    return out[0] if isinstance(out, tuple) else out


class _Passed(Tensor):
    """Hidden states as a block hands them on: a tensor or, where the model expects a tuple and unpacks it, its first part."""

    # what is computed from them is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> Any:
        return self if type(key) is int and key == 0 else super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        return iter((self, None))


class _Recorded(Exception):
    """Leaves the model's forward once the last block has been reached."""


class Recorder:
    """Records calls with few tensors: equal ones, such as every batch's rotary tables, are kept once."""

    def __init__(self) -> None:
        self._pool: list[Tensor] = []

    def record(self, model: PreTrainedModel, blocks: Sequence[nn.Module], **inputs: Tensor | None) -> tuple[Tensor, list[Call]]:
        """The first block's hidden states (batch, tokens, width) and every block's `Call` for one batch of inputs."""
        hidden: list[Tensor] = []
        calls: list[Call] = []

        def take(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            by_name = not args
            first = kwargs.pop(_HIDDEN) if by_name else args[0]
            hidden.append(first.as_subclass(Tensor))
            calls.append(Call(self._intern(args[1:]), self._intern(kwargs), by_name))
            if index == len(blocks) - 1:
                raise _Recorded
            return first.as_subclass(_Passed)

        with forwards_replaced(blocks, take):
            try:
                model(**inputs, use_cache=False)
            except _Recorded:
                return hidden[0], calls
        raise InputError(f"the forward of {type(model).__name__} does not reach the last block that was found in it")

    def _intern(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._same(value)
        if isinstance(value, dict):
            return {key: self._intern(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._intern(item) for item in value)
        return value

    def _same(self, tensor: Tensor) -> Tensor:
        for known in self._pool:
            if known.shape == tensor.shape and known.dtype == tensor.dtype and torch.equal(known, tensor):
                return known
        self._pool.append(tensor)
        return tensor


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward can be asked for the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def last_output(model: PreTrainedModel, blocks: Sequence[nn.Module], **inputs: Tensor | None) -> Tensor:
    """The last block's outputs (batch, tokens, width) in a forward of the whole model, whose head sees one token if it can."""
    outputs: list[Tensor] = []
    few = {"logits_to_keep": 1} if keeps_logits(model) else {}
    handle = blocks[-1].register_forward_hook(lambda module, args, out: outputs.append(_hidden(out)))
    try:
        model(**inputs, use_cache=False, **few)
    finally:
        handle.remove()
    return outputs[-1]  # a block may be run more than once


def head(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    output: Tensor,
    positions: Tensor | None = None,
    **inputs: Tensor | None,
) -> Tensor:
    """The model's logits (batch, tokens, vocabulary) where its last block returns `output`; of the tokens at `positions`
    (tokens,), on the CPU, or of all.
    """

    def give(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        passed = output if index == len(blocks) - 1 else args[0] if args else kwargs[_HIDDEN]
        return passed.as_subclass(_Passed)

    some = {"logits_to_keep": positions} if positions is not None and keeps_logits(model) else {}
    with forwards_replaced(blocks, give):
        logits = model(**inputs, use_cache=False, return_dict=True, **some).logits
    return logits if some or positions is None else logits[:, positions]


@contextmanager
def forwards_replaced(
    blocks: Sequence[nn.Module], forward: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """Have modules call `forward` with their number, arguments and keyword arguments instead of their own."""

    def bind(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(index, args, kwargs)

    own = [block.__dict__.get("forward") for block in blocks]  # a hook may have put one on the instance
    for index, block in enumerate(blocks):
        block.forward = bind(index)
    try:
        yield
    finally:
        for block, hooked in zip(blocks, own, strict=True):
            if hooked is None:
                del block.forward
            else:
                block.forward = hooked
