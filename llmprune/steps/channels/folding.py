"""Norms without weights: what a norm multiplies each channel by goes into the matrices that read it, so that between the two
the channels can be rotated (Ashkboos et al., "SliceGPT", 2024, section 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.models.sites import Block
from llmprune.steps.channels.moves import Moves, Ones, Scale, joined
from llmprune.steps.channels.places import columns_of, others, readers

_TOKENS = 64  # that a norm is tried on
_EXACT = 1e-4  # relative error in float32


def fold(block: Block, rotation: Tensor, run: Callable[[], Any]) -> Moves:
    """All norms of the block's hidden channels without weights.

    Args:
        rotation: (width, width), any, of hidden channels; on the CPU.
        run: calls the block, so that it is seen who is handed what a norm puts out.

    Raises:
        InputError: a norm cannot do without weights.
    """
    norms = {path: module for path, module in block.module.named_modules() if _scales(module, len(rotation))}
    handed = _handed(block.module, norms, run)
    return joined(_folded(block, rotation, path, norms[path], into) for path, into in handed.items())


def fold_last(model: PreTrainedModel, names: Sequence[str], rotation: Tensor) -> Moves:
    """The norms outside the blocks, of which the head reads the last one, without weights.

    Args:
        names: of parameters outside the blocks.
        rotation: as in `fold`.

    Raises:
        InputError: there is another number of them than one, or it cannot do without weights.
    """
    paths = {name.rpartition(".")[0] for name in names}
    norms = {path: module for path in paths if _scales(module := model.get_submodule(path), len(rotation))}
    if len(norms) != 1:
        raise InputError("outside the blocks there is not one norm, whose weights the head could take over")
    [(path, norm)] = norms.items()
    return {f"{path}.weight": [Ones()], head_name(model): [Scale(_factor(path, norm, rotation), 1)]}


def head_name(model: PreTrainedModel) -> str:
    """What the model calls its head's matrix.

    Raises:
        InputError: it has none.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise InputError("the model has no head that is one matrix")
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def free_head(model: PreTrainedModel) -> None:
    """Give the head a matrix of its own."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)


@contextmanager
def untied(model: PreTrainedModel) -> Iterator[Mapping[str, str]]:
    """The head with a matrix of its own for a while. Yields what is a copy of what: the head's name and that of the embeddings,
    or nothing where they were not tied."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    own = getattr(head, "weight", None)
    if not isinstance(head, nn.Linear) or own is not table.get_parameter("weight"):
        yield {}
        return
    name = next(name for name, parameter in model.named_parameters() if parameter is own)
    free_head(model)
    try:
        yield {head_name(model): name}
    finally:
        head.weight = own


def _scales(module: nn.Module, width: int) -> bool:
    """Whether its parameters are vectors of hidden channels."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(parameter.shape == (width,) for parameter in own)


def _handed(block: nn.Module, norms: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, list[str]]:
    """By norm, the modules that are handed what it puts out."""
    out: dict[int, tuple[str, Tensor]] = {}  # by address; kept, or else another tensor could get it
    found: dict[str, list[str]] = {path: [] for path in norms}

    def put_out(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, value: Tensor) -> None:
            out[value.data_ptr()] = path, value

        return hook

    def handed(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            for address in (own.data_ptr() for own in tensors if own.data_ptr() in out):
                found[out[address][0]].append(path)

        return hook

    handles = [module.register_forward_hook(put_out(path)) for path, module in norms.items()]
    handles += [
        module.register_forward_pre_hook(handed(path), with_kwargs=True)
        for path, module in block.named_modules()
        if path and path not in norms
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _folded(block: Block, rotation: Tensor, path: str, norm: nn.Module, into: list[str]) -> Moves:
    """One norm without weights."""
    if not into:
        if "." in path:  # of queries or keys, as many as hidden channels
            return {}
        raise InputError(f"{block.name}.{path} stands behind what writes, and no matrix could take over its weights")
    width, factor = len(rotation), _factor(f"{block.name}.{path}", norm, rotation)
    reading = tuple(f"{block.name}.{own}." for own in into)
    sites = [site for site in readers(block, width) if f"{site.name}.".startswith(reading)]
    scaled: list[Moves] = [{site.parameter: [Scale(factor, columns_of(site), site.part)]} for site in sites]
    choosing = [(name, own.ndim - 1) for name, own in others(block, width) if own.ndim > 1 and not name.endswith("bias")]
    scaled += [{name: [Scale(factor, dim)]} for name, dim in choosing if name.startswith(reading)]
    return joined([{f"{block.name}.{path}.weight": [Ones()]}, *scaled])


def _factor(name: str, norm: nn.Module, rotation: Tensor) -> Tensor:
    """What it multiplies each channel by, (width,), where with all weights 1 it multiplies all by the same.

    Raises:
        InputError: rotated channels would not come out of it rotated.
    """
    x = torch.randn(_TOKENS, len(rotation), generator=torch.Generator().manual_seed(0)) + 1
    tried = copy.deepcopy(norm).to("cpu", torch.float32)
    if [which for which, _ in tried.named_parameters()] != ["weight"]:
        raise InputError(f"{name} adds a bias")
    scaled = tried(x)
    tried.get_parameter("weight").data.fill_(1)
    out = tried(x)
    if not bool((tried(x @ rotation) - out @ rotation).norm() <= _EXACT * out.norm()):
        raise InputError(f"{name} does more than to scale, such as subtract the mean")
    return (scaled * out).sum(0) / out.square().sum(0)
