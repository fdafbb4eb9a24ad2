"""Load what llmprune wrote, or any other model; packed and 2:4 linear layers stay packed, one layer at a time."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from llmprune.base.errors import InputError, plain_errors, unknown
from llmprune.base.hardware import pick_device, stored_dtype
from llmprune.base.notation import DTYPES
from llmprune.formats.fuse import fuse
from llmprune.formats.kernels.bitmask import Bitmask
from llmprune.formats.kernels.native import computes
from llmprune.formats.kernels.reference import arrange, compress, violation
from llmprune.formats.layer import Sparse24Linear, SparseLinear, replace_module, sparse_layers
from llmprune.formats.matrices import TwoOfFour
from llmprune.formats.packed import DenseView, linears, open_checkpoint
from llmprune.formats.quantised import CodesView
from llmprune.models.resolve import resolve, spelled
from llmprune.models.skeleton import Skeleton, load_config, load_model

_BFLOAT16 = (8, 0)  # CUDA devices from here on compute in it
_PEEK = 16  # rows that show whether a matrix may be 2:4


def load_packed(
    folder: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype, *, dense: bool, check: bool
) -> PreTrainedModel | None:
    """The model of a packed or quantised folder, or of a dense one that has 2:4 linear layers; None for any other.

    Args:
        dense: unpack all layers.
        check: compare the packed files with their sums.

    Raises:
        InputError: a file is damaged, or does not fit the configuration.
    """
    checkpoint = open_checkpoint(folder)
    if isinstance(checkpoint, DenseView) and check:
        checkpoint.packed.check(checkpoint.packed.files)
    other = isinstance(checkpoint, (DenseView, CodesView))  # than what transformers load into the same layers
    if dense and not other:
        return None
    skeleton = Skeleton(checkpoint, config, device, dtype)
    linear = linears(skeleton)
    kept: set[str] = set()
    if not dense:
        for disk, name in linear.items():
            if f"{name}.weight" not in _tied(skeleton) and (found := _packed(skeleton, disk)):
                kept |= _put(skeleton, name, found)
                if device.type == "cuda" or computes(device, dtype):
                    fuse(skeleton.model.get_submodule(name.rpartition(".")[0]))  # at once, so that its memory is used again
        if not kept and not other:
            return None
    skeleton.fill(name for name in skeleton.names if name not in kept)
    skeleton.tie()
    if (folder / "generation_config.json").is_file():
        skeleton.model.generation_config = GenerationConfig.from_pretrained(folder)
    if kept:
        _tell(skeleton)
        vars(skeleton.model)["save_pretrained"] = _refuse_to_save  # from_pretrained would read what it writes without weights
        for module in sparse_layers(skeleton.model).values():
            if isinstance(module, Sparse24Linear):
                module.prepare()
    return skeleton.model


def _refuse_to_save(*_: object, **__: object) -> None:
    raise InputError("a packed model is not saved: copy its folder; llmprune pack and unpack convert folders")


def _tied(skeleton: Skeleton) -> set[str]:
    pairs = skeleton.model.all_tied_weights_keys.items()
    return {name for pair in pairs for name in pair}


def _packed(skeleton: Skeleton, disk: str) -> TwoOfFour | Bitmask | None:
    """A matrix, if it is packed or 2:4."""
    checkpoint = skeleton.checkpoint
    if isinstance(checkpoint, DenseView):
        return checkpoint.packed.layer(disk) if disk in checkpoint.packed.layers else None
    ((_, weight),) = checkpoint.read([disk])
    if violation(weight[:_PEEK]) or violation(weight):
        return None
    return TwoOfFour(*compress(weight))


def _put(skeleton: Skeleton, name: str, found: TwoOfFour | Bitmask) -> set[str]:
    """Give the model a packed layer in place of the one called `name`; returns the tensors that it holds now."""
    device, dtype = skeleton.device, skeleton.dtype
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < _BFLOAT16:
        raise InputError(f"{torch.cuda.get_device_name(device)} has no bfloat16: pass dtype='float16' (--dtype float16)")
    numbers = found.scale if isinstance(found, Bitmask) and found.scale is not None else found.values
    if not bool(torch.isfinite(numbers).all()):
        raise InputError(f"the weights of {name} in {skeleton.checkpoint.folder} are not finite (NaN or infinity)")
    held, bias = {f"{name}.weight"}, None
    if f"{name}.bias" in skeleton.names:
        held.add(f"{name}.bias")
        ((_, stored),) = skeleton.checkpoint.read([skeleton.names[f"{name}.bias"][0].disk])
        bias = stored.to(device, dtype, copy=True)
    layer: nn.Module
    if isinstance(found, TwoOfFour) and computes(device, dtype):  # there are products for CPUs of this kind only
        found = found.masked()
    if isinstance(found, Bitmask):
        layer = SparseLinear(found.to(device, dtype), bias)
    else:
        layer = Sparse24Linear(arrange(found.values.to(device, dtype, copy=True), found.codes.to(device)), bias)
    replace_module(skeleton.model, name, layer)
    return held


def _tell(skeleton: Skeleton) -> None:
    """List the matrices of the blocks that stay dense."""
    rest = [site.name for block in skeleton.describe() for site in block.sites]
    if rest:
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
        warnings.warn(f"not packed, so dense: {', '.join(rest[:3])}{more}", stacklevel=4)


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    dense: bool = False,
    check: bool = True,
) -> PreTrainedModel:
    """A model that llmprune wrote, or any other: a bundled name, a folder or a Hub id, in eval mode.

    Linear layers that are 2:4, in a packed folder or a dense one, and other packed ones stay packed in memory, for inference:
    as `SparseLinear`, on GPUs 2:4 ones as `Sparse24Linear`. What stays dense in the blocks is listed in a warning. Models
    without such layers load as `from_pretrained` loads them; needed, too, where `--per-layer` made layers of different sizes.
    Codes of a quantised folder become the weights that they stand for, without the compressed-tensors package; those of packed
    layers stay codes.

    Args:
        device: `auto` is CUDA where there is one, else the CPU.
        dtype: `auto` is the checkpoint's own, on every device.
        dense: leave or make all layers dense.
        check: compare a packed folder's weights with the sums in its `packed.json`, which reads them once more: a quarter
            to a third of the time that loading takes otherwise, on one CPU core.

    Raises:
        InputError: it cannot be loaded, in one line.
    """
    with plain_errors("free some, or load on another device"):
        folder = resolve(spelled(model))
        config, where = load_config(folder.path, quantised=True), pick_device(device)
        compute = _dtype(dtype, config)
        packed = load_packed(folder.path, config, where, compute, dense=dense, check=check)
        return packed if packed is not None else load_model(folder.path, config, where, compute)


def _dtype(name: str | torch.dtype, config: PretrainedConfig) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return stored_dtype(config) if name == "auto" else getattr(torch, name)
