"""Masks drawn at random: what any method is to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.numerics.patterns import Pattern
from llmprune.numerics.stats import TokenCount
from llmprune.solvers.base import Solution, masked

statistic = TokenCount
stackable = False
batched = true_sequential = False
products = 0
generator = torch.Generator()  # the script that uses it sets its seed


def solve(w: Tensor, stat: TokenCount, pattern: Pattern) -> Solution:
    return masked(w, pattern.keep(torch.rand(w.shape, generator=generator).to(w.device)))
