"""The device and dtype to compute in, and how much memory was used."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from llmprune.base.errors import InputError, reason, unknown
from llmprune.base.notation import DTYPES
from llmprune.base.precision import full_float32

FASTER = 1.5  # how much faster bfloat16 products must be to be chosen: between close speeds the choice would change by chance
_MEASURED = 0.03  # seconds that finding out takes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = 128 * 1024, 65536  # their initial values


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


def processor_name(device: torch.device) -> str:
    """What tells the machines apart on which `device` may be: a GPU's own name, else that of the CPU, as far as it is known."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(errors="replace").splitlines() if facts.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{device.type} {platform.machine()} {named}".strip()


class Dtype(NamedTuple):
    """A dtype to compute in, and why `auto` chose it, in words; nothing where the user did."""

    dtype: torch.dtype
    why: str


def pick_dtype(name: str, device: torch.device, config: PretrainedConfig) -> Dtype:
    """The compute dtype called `name`; `auto` is the checkpoint's, but on a CPU float32, or bfloat16 where the checkpoint is
    stored so and this CPU's products in it are measured to be faster.

    A float16 checkpoint is computed in float32 on a CPU: bfloat16, with 8 bits of mantissa against 11, would round its weights.

    Raises:
        InputError: there is none of that name.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    if name != "auto":
        return Dtype(getattr(torch, name), "")
    stored = stored_dtype(config)
    if device.type != "cpu" or stored == torch.float32:
        return Dtype(stored, "stored so")
    if stored != torch.bfloat16:
        return Dtype(torch.float32, f"stored in {dtype_name(stored)}")
    speed = bfloat16_products()
    if speed >= FASTER:
        return Dtype(stored, f"stored so, and its products are {speed:.1f}x as fast as float32's here")
    return Dtype(torch.float32, f"bfloat16 products are {speed:.1f}x as fast here")


def stored_dtype(config: PretrainedConfig) -> torch.dtype:
    """The checkpoint's; float32 where its configuration names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def bfloat16_products() -> float:
    """How many times as fast as float32 ones this CPU's products of matrices are in bfloat16, measured once: the best of what
    fits into 30 ms, on one thread, since the waits of several for each other say nothing of the dtype.
    """
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    threads, end = torch.get_num_threads(), time.perf_counter() + _MEASURED
    torch.set_num_threads(1)
    try:
        while math.inf in best.values() or time.perf_counter() < end:
            for dtype in best:
                a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
                start = time.perf_counter()
                a @ b
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[torch.float32] / best[torch.bfloat16]


@functools.cache
@full_float32()
def operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of matrices, measured once: the better of two. The numbers are random,
    for a GPU multiplies zeros and ones faster."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
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
    _glibc("mallopt", _M_TRIM_THRESHOLD, _TRIM_THRESHOLD)  # it rises with what has been freed before


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have glibc's heap keep what is freed, large allocations too, for work that makes tensors of the same sizes again and
    again: taken from the system anew at every step, their pages cost a fifth of a training's time on a CPU."""
    _glibc("mallopt", _M_MMAP_MAX, 0)
    _glibc("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _glibc("mallopt", _M_MMAP_MAX, _MMAP_MAX)
        _glibc("mallopt", _M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        return_free_memory()


def return_free_memory() -> None:
    """Have glibc give what was freed back to the system: without it, its heap grew from block to block, and within them."""
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
