"""The device and dtype to compute in, and how much memory was used."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import PretrainedConfig

from llmprune.base.errors import InputError, reason

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def pick_device(name: str, local: int = 0) -> torch.device:
    """The device called `name`; `auto` is CUDA where there is one, else the CPU. Of several GPUs it is number `local`, unless
    the name has a number.

    Raises:
        InputError: it cannot be used here.
    """
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    wanted = f"cuda:{local}" if wanted == "cuda" else wanted
    try:
        if torch.device(wanted).type == "mps":
            raise InputError("device 'mps' has no float64, in which statistics are summed: choose cpu")
        device = torch.zeros(1, device=wanted).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {reason(error)}") from None
    if device.type == "meta":
        raise InputError("device 'meta' holds no data: choose cpu or cuda")
    return device


def device_name(device: torch.device) -> str:
    """What is recorded of where something was measured: a GPU's own name, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pick_dtype(name: str, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    """The compute dtype called `name`; `auto` is float32 on the CPU, else the checkpoint's."""
    chosen = getattr(torch, name) if name != "auto" else torch.float32 if device.type == "cpu" else config.dtype
    return chosen if isinstance(chosen, torch.dtype) else torch.float32


def operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of matrices, measured now: the better of two."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.ones(side, side, device=device, dtype=dtype)
    best = 0.0
    for _ in range(3):  # the first warms up
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for what the device has been told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def map_large_allocations() -> None:
    """Have glibc take large allocations from the system one by one and give each back when it is freed.

    Its heap keeps what is freed, so that peak memory depends on chance: call this before any large tensor is made. Costs
    time where tensors are small.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, 4_000_000)
    _glibc("mallopt", _M_TRIM_THRESHOLD, 128 * 1024)  # its initial value; it rises with what has been freed before


def return_free_memory() -> None:
    """Have glibc give the rest of what was freed back to the system: without it, its heap grew from block to block."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function of the C library, where it has it."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def restart_peak_memory() -> None:
    """Count this process's peak anew from here, where Linux can."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes.

    Linux's own count of this program: getrusage would start from what the parent process held at the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
