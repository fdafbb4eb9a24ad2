"""Shapes of real models, random 2:4 matrices, and inputs that are correlated as those of real layers are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmprune.formats.kernels.roads import limits
from llmprune.numerics.patterns import NM

FUSED = [(28672, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (4096, 4096)]  # gate+up, gate, down, q+k+v, o of 8B
SOLVED = [(4096, 4096), (14336, 4096), (4096, 14336)]
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_70B: dict[str, Any] = LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
TINY: dict[str, Any] = LLAMA_8B | {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where the pieces run. `small`: tiny sizes, kernels in Triton's interpreter."""

    device: torch.device
    small: bool

    @property
    def fast(self) -> bool:
        return not self.small

    @property
    def processors(self) -> int:
        return limits(self.device)[0] if self.fast else 4

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may have."""
        return limits(self.device)[1] if self.fast else 2**18


def two_of_four(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    w = torch.randn(rows, columns, device=device) / columns**0.5
    return torch.where(NM(2, 4).keep(torch.rand_like(w)), w, 0).to(dtype)


def correlated(tokens: int, columns: int, device: torch.device) -> Tensor:
    """(tokens, columns) in float32: a fourth as many factors as columns, noise, and scales that differ as outliers do."""
    factors = torch.randn(tokens, columns // 4, device=device) @ torch.randn(columns // 4, columns, device=device)
    scales = torch.exp(0.5 * torch.randn(columns, device=device))
    return (factors / (columns // 4) ** 0.5 + 0.5 * torch.randn(tokens, columns, device=device)) * scales
