"""Packed layers that read the same inputs, as one product: q, k and v; gate and up.

The model's own code stays as it is: the first of them to be called computes all, the others hand out their parts. On a GPU
that is one launch for several, and a matrix that is large enough to fill the device; on a CPU the inputs are read in once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.formats.kernels.bitmask import STRIP
from llmprune.formats.layer import Sparse24Linear, SparseLinear, replace_module
from llmprune.models.families import ATTENTION, FEED_FORWARD

_TOGETHER = dict.fromkeys(row.producers for row in (*ATTENTION, *FEED_FORWARD) if len(row.producers) > 1)


class Fused(nn.Module):
    """Several layers above each other, and the outputs that have not been asked for yet."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.whole: Sparse24Linear | SparseLinear = type(layers[0]).joined(layers, torch.cat(biases) if biases else None)
        for name, tensor in list(self.whole.named_buffers()):
            self.whole.register_buffer(name, tensor, persistent=False)  # the parts save it, each its own rows
        ends = torch.tensor([0, *(layer.out_features for layer in layers)]).cumsum(0).tolist()
        self.places = list(pairwise(ends))
        self._kept: tuple[Tensor, Tensor, tuple[int, ...]] | None = None

    def part(self, x: Tensor, number: int) -> Tensor:
        """What layer `number` puts out for `x`."""
        kept = self._kept  # one object: another thread may put its own there meanwhile
        if kept is None or kept[0] is not x or number not in kept[2]:
            kept = (x, self.whole(x), tuple(range(len(self.places))))
        left = tuple(other for other in kept[2] if other != number)
        self._kept = (kept[0], kept[1], left) if left else None
        start, end = self.places[number]
        return kept[1][..., start:end]


class FusedPart(nn.Module):
    """One of several layers that run as one. The first holds their weights; a state has each one's rows by its own name."""

    def __init__(self, fused: Fused, number: int) -> None:
        super().__init__()
        self.number = number
        if number:
            object.__setattr__(self, "fused", fused)  # a reference, not a child: weights are moved once
        else:
            self.fused = fused

    @property
    def weight(self) -> Tensor:
        start, end = self.fused.places[self.number]
        return self.fused.whole.weight[start:end]

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.part(x, self.number)

    def _rows(self) -> dict[str, Tensor]:
        """Views of this layer's own part of the state."""
        return self.fused.whole.rows(*self.fused.places[self.number])

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination |= {prefix + name: own for name, own in self._rows().items()}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, own in self._rows().items():
            given = state_dict.get(prefix + name)
            if given is None:
                missing_keys.append(prefix + name)
            elif given.shape != own.shape:
                error_msgs.append(f"{prefix}{name} is {tuple(given.shape)}, not {tuple(own.shape)}")
            else:
                own.copy_(given)
        self.fused.whole.changed()


def fuse(model: nn.Module) -> None:
    """Fuse what can be, in place."""
    for name, parent in list(model.named_modules()):
        for names in _TOGETHER:
            layers = [layer for own in names if isinstance(layer := getattr(parent, own, None), (Sparse24Linear, SparseLinear))]
            if len(layers) == len(names) and _alike(layers):
                fused = Fused(layers)
                for number, own in enumerate(names):
                    replace_module(model, f"{name}.{own}" if name else own, FusedPart(fused, number))


def _alike(layers: Sequence[Sparse24Linear | SparseLinear]) -> bool:
    """Whether all are stored alike, read as many columns, and have a bias or none."""
    kinds = set()
    for layer in layers:
        groups = layer.scale.shape[1] if isinstance(layer, SparseLinear) and layer.scale is not None else 0
        kinds.add((type(layer), layer.in_features, layer.bias is None, layer.values.dtype, groups))
    whole = all(layer.out_features % STRIP == 0 for layer in layers[:-1])
    return len(kinds) == 1 and (whole or not isinstance(layers[0], SparseLinear))
