"""The device and dtype to compute in, and how much memory was used."""

from __future__ import annotations

import resource
import sys

import torch
from transformers import PretrainedConfig

from llmprune.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA where there is one, else the CPU.

    Raises:
        InputError: it cannot be used here.
    """
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.zeros(1, device=wanted).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


def pick_dtype(name: str, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    """The compute dtype called `name`; `auto` is float32 on the CPU, else the checkpoint's."""
    chosen = getattr(torch, name) if name != "auto" else torch.float32 if device.type == "cpu" else config.dtype
    return chosen if isinstance(chosen, torch.dtype) else torch.float32


def peak_memory(device: torch.device) -> dict[str, int]:
    """Highest memory so far, in bytes: resident in this process, and allocated by torch on the device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    return peak | ({"device": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})
