"""Batches between the host, where they rest, and the device, where they are used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; a GPU's is pinned, so that its way back can run beside the GPU's work."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class Ahead:
    """Takes tensors to the device; of pinned ones the next can be on its way, on a stream of its own, while one is in use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: tuple[Tensor, int, Tensor] | None = None  # the tensor, its version, and its copy

    def start(self, tensors: Sequence[Tensor], index: int) -> None:
        """Send tensor `index` ahead, if there is one."""
        if self._stream is not None and index < len(tensors) and tensors[index].is_pinned():
            with torch.cuda.stream(self._stream):
                copy = tensors[index].to(self._device, non_blocking=True)
            self._coming = (tensors[index], tensors[index]._version, copy)

    def take(self, tensors: Sequence[Tensor], index: int) -> Tensor:
        """Tensor `index` on the device."""
        tensor = tensors[index]
        if self._stream is None or self._coming is None:
            return tensor.to(self._device)
        sent, version, copy = self._coming
        if sent is not tensor or version != tensor._version:
            return tensor.to(self._device)
        now, self._coming = torch.cuda.current_stream(self._device), None
        now.wait_stream(self._stream)
        copy.record_stream(now)
        return copy
