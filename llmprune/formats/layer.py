"""Linear layers whose sparse matrix stays packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.formats.kernels import dispatch
from llmprune.formats.kernels.bitmask import STRIP, Bitmask, stacked, starts
from llmprune.formats.kernels.ops import masked_product, product
from llmprune.formats.kernels.reference import Packed, arrange, compress, unpack


class Sparse24Linear(nn.Module):
    """As `nn.Linear`, for inference.

    Attributes:
        values, meta: buffers, as in `kernels.reference.Packed`.
        blob: the same again as cuSPARSELt wants it, where that was measured to be worth it; not saved.
        bias: a buffer (out,), or None.
        weight: the dense matrix (out, in), unpacked anew each time.
    """

    values: Tensor
    meta: Tensor
    bias: Tensor | None
    blob: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, len(packed.values)
        self.register_buffer("values", packed.values)
        self.register_buffer("meta", packed.meta)
        self.register_buffer("bias", bias)
        self.register_buffer("blob", None, persistent=False)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Sparse24Linear:
        """Raises: ValueError: the matrix (out, in) is not 2:4."""
        return cls(arrange(*compress(weight)), bias)

    @classmethod
    def joined(cls, layers: Sequence[Sparse24Linear], bias: Tensor | None) -> Sparse24Linear:
        """Several that read as many columns, above each other."""
        values, meta = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("values", "meta"))
        return cls(Packed(values, meta, layers[0].in_features), bias)

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """Views of some rows' own part of the state."""
        return {name: tensor[start:end] for name, tensor in self.named_buffers() if name != "blob"}

    def changed(self) -> None:
        """What was made of the state does not hold any more."""
        self.blob = None

    @property
    def packed(self) -> Packed:
        return Packed(self.values, self.meta, self.in_features)

    @property
    def weight(self) -> Tensor:
        return unpack(self.packed)

    def prepare(self) -> None:
        """On a GPU, measure which road is quickest for how many tokens, and make what that road needs."""
        self.blob = dispatch.prepare(self.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sparse24Linear:
        """As for any module; the copy for cuSPARSELt, which is no plain number, does not survive another dtype."""
        before = self.values.dtype
        super()._apply(fn, recurse)
        if self.values.dtype != before:
            self.blob = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.values, self.meta, self.bias, self.blob, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, 2:4"


class SparseLinear(nn.Module):
    """As `nn.Linear`, for inference, of any sparse matrix: a mask and what is not zero.

    Attributes:
        mask, values, starts, scale: buffers, as in `kernels.bitmask.Bitmask`.
        bias: a buffer (out,), or None.
        weight: the dense matrix (out, in), expanded anew each time.
    """

    mask: Tensor
    values: Tensor
    starts: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Bitmask, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.columns, packed.rows
        for name in ("mask", "values", "scale"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("starts", packed.starts, persistent=False)  # follows from the mask
        self.register_buffer("bias", bias)

    @classmethod
    def joined(cls, layers: Sequence[SparseLinear], bias: Tensor | None) -> SparseLinear:
        """Several that read as many columns, above each other; of all but the last, the rows are whole strips."""
        return cls(stacked([layer.packed for layer in layers]), bias)

    def rows(self, start: int, end: int) -> dict[str, Tensor]:
        """Views of some rows' own part of the state; they begin with a strip."""
        own = self.packed.strips(start // STRIP, -(-end // STRIP))
        parts = {"mask": own.mask, "values": own.values, "scale": own.scale}
        bias = None if self.bias is None else self.bias[start:end]
        return {name: part for name, part in (parts | {"bias": bias}).items() if part is not None}

    def changed(self) -> None:
        """The mask may be another."""
        self.starts = starts(self.mask, self.values.dtype == torch.uint8)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.changed()

    @property
    def packed(self) -> Bitmask:
        return Bitmask(self.mask, self.values, self.starts, self.scale, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        return self.packed.weight()

    def forward(self, x: Tensor) -> Tensor:
        return masked_product(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        kind = "codes" if self.scale is not None else "weights"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, sparse {kind}"


def nbytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, copies for cuSPARSELt included; what is shared counts once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def sparse_layers(model: nn.Module) -> dict[str, Sparse24Linear | SparseLinear]:
    """By full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (Sparse24Linear, SparseLinear))}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module called `name` is."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, new)
