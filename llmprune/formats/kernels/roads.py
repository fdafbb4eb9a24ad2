"""The roads a product with a packed matrix may take on a GPU, and what each costs for a matrix like this one.

`gemv` is a kernel for one token or two, `decode` one for few; `decompress` writes the dense matrix, and cuBLAS multiplies;
`cusparselt` is for the sparse tensor cores, through torch; `reference` is plain torch, for where all others fail.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.formats.kernels import cusparselt, decode, decompress, gemv, reference
from llmprune.formats.kernels.plan import MOST
from llmprune.formats.kernels.reference import Packed
from llmprune.formats.kernels.timing import copies, eager_seconds, graph_seconds

Road = Callable[[Tensor, Packed, "Tensor | None", "Tensor | None"], Tensor]
_TOLERANCE = 2e-2  # of the largest output: 16-bit outputs of float32 sums
_MANY = 512  # tokens from which on it does not matter whether weights are found in the cache


@cache
def limits(device: torch.device) -> tuple[int, int]:
    """A GPU's multiprocessors, and the bytes of shared memory a program may have."""
    own = torch.cuda.get_device_properties(device)
    return own.multi_processor_count, getattr(own, "shared_memory_per_block_optin", 48 * 1024)


def by_decode(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
    processors, shared = limits(x.device)
    return decode.decode24(x, packed.values, packed.meta, bias, processors=processors, shared=shared)


def by_gemv(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
    return gemv.gemv24(x, packed.values, packed.meta, bias)


def by_decompress(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
    return functional.linear(x, decompress.decompress24(packed.values, packed.meta, packed.columns, fast=True), bias)


def by_cusparselt(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
    assert blob is not None
    return cusparselt.multiply(x, blob, bias)


def by_reference(x: Tensor, packed: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
    return reference.linear24(x, packed, bias)


ROADS: dict[str, Road] = {
    "gemv": by_gemv, "decode": by_decode, "decompress": by_decompress, "cusparselt": by_cusparselt, "reference": by_reference,
}  # fmt: skip


class Trial:
    """A matrix on which roads are tried. Its copies, inputs and right results are made once, when they are needed.

    Args:
        most: tokens that are tried at most.
    """

    def __init__(self, packed: Packed, blob: Tensor | None, most: int) -> None:
        self.packed, self.blob, self.most = packed, blob, most

    @cached_property
    def x(self) -> Tensor:
        """Inputs that leave the user's own random numbers as they are."""
        values = self.packed.values
        generator = torch.Generator(values.device).manual_seed(0)
        return torch.randn(self.most, self.packed.columns, generator=generator, device=values.device, dtype=values.dtype)

    @cached_property
    def right(self) -> Tensor:
        return reference.linear24(self.x, self.packed, None)

    @cached_property
    def twins(self) -> list[tuple[Packed, Tensor | None]]:
        """More copies than the device's cache holds."""
        own = self.packed
        many = copies(own.values.nbytes + own.meta.nbytes, own.values.device)
        return [
            (Packed(own.values.clone(), own.meta.clone(), own.columns), None if self.blob is None else self.blob.clone())
            for _ in range(many)
        ]

    def roads(self, tokens: int) -> list[str]:
        """Those that can be tried."""
        few = [*(["gemv"] if tokens <= gemv.MOST else []), *(["decode"] if tokens <= MOST else [])]
        return [*few, "decompress", *([] if self.blob is None else ["cusparselt"])]

    def seconds(self, name: str, tokens: int) -> float | str:
        """Of one product of so many tokens; or why there is none.

        Raises:
            torch.OutOfMemoryError: as the device does.
        """
        x, road, host = self.x[:tokens], ROADS[name], 0.0
        try:
            if name == "cusparselt" and self.blob is not None:
                cusparselt.search(x, self.blob)
                # a call takes the host 0.8 ms, and prompts are seldom run in a graph
                host = eager_seconds(partial(road, x, self.packed, None, self.blob), x.device)
            gap = float((road(x, self.packed, None, self.blob).float() - self.right[:tokens].float()).abs().max())
            most = float(self.right[:tokens].abs().max())
            if not gap <= _TOLERANCE * most:
                return f"wrong: off by {gap:.1e}, where the largest output is {most:.1e}"
            twins = self.twins if tokens < _MANY else self.twins[:1]
            return max(host, graph_seconds([partial(road, x, own, None, blob) for own, blob in twins], x.device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  Triton and CUDA raise what they like: such a road is not taken
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
