"""Compile a share of the kernels that `sweep` times: `python -m gpu.warm INDEX OF`."""

from __future__ import annotations

import sys
from contextlib import suppress

import torch

from gpu.shapes import Place, two_of_four
from gpu.sweep import SIZES, kernels, product_of, triton_errors
from llmprune.formats.kernels import reference


def main() -> None:
    index, of = map(int, sys.argv[1:])
    place = Place(torch.device("cuda"), small=False)
    packed = reference.pack(two_of_four(256, 2048, torch.bfloat16, place.device))
    for size, own in [(tokens, own) for tokens in SIZES for own in kernels(tokens)][index::of]:
        x = torch.randn(size, 2048, device=place.device, dtype=torch.bfloat16)
        with suppress(*triton_errors()):  # what cannot be launched is left out by the sweep
            product_of(place, x, packed, own)


if __name__ == "__main__":
    main()
