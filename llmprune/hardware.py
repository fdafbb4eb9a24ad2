"""The device and dtype to compute in, and how much memory was used."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch
from transformers import PretrainedConfig

from llmprune.errors import InputError, reason


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA where there is one, else the CPU.

    Raises:
        InputError: it cannot be used here.
    """
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.zeros(1, device=wanted).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {reason(error)}") from None
    if device.type == "meta":
        raise InputError("device 'meta' holds no data: choose cpu or cuda")
    return device


def pick_dtype(name: str, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    """The compute dtype called `name`; `auto` is float32 on the CPU, else the checkpoint's."""
    chosen = getattr(torch, name) if name != "auto" else torch.float32 if device.type == "cpu" else config.dtype
    return chosen if isinstance(chosen, torch.dtype) else torch.float32


def return_free_memory() -> None:
    """Have the C library give freed memory back to the system, where it can (glibc keeps it, and block after block its
    heap grew by as much as a block although no more tensors were alive)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Highest memory so far, in bytes: resident in this process, and allocated by torch on the device."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    return peak | ({"device": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})
