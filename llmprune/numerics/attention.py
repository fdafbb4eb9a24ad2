"""Causal attention of bfloat16 tensors on a CPU, as one operation.

torch's own attention there is no faster in bfloat16 than in float32. This one takes the scores of some queries of some heads at
a time, as products that the CPU's bfloat16 instructions count and that are summed in float32, and their softmax in float32; its
gradient counts the probabilities once more. Scores take no more memory than `SCORES`, or `QUERIES` of one group of heads.
(Dao et al., 2022, without the running softmax: all keys of a query are taken at once.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from llmprune.numerics.products import bfloat16_products

QUERIES = 128  # taken at a time: fewer cost calls, more cost masked scores
SCORES = 2**19  # of the heads that are taken together: they should stay in the cache


@torch.library.custom_op("llmprune::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v, where a query sees the keys up to its own place: (batch, heads, tokens, width) bfloat16.

    Args:
        q: (batch, heads, tokens, width), bfloat16.
        k: (batch, groups, tokens, width); heads / groups of the heads in a row share one of its heads.
        v: as `k`.
    """
    queries, keys, values = _by_group(q, k).float(), k.flatten(0, 1).float(), v.flatten(0, 1)
    out = torch.empty_like(queries, dtype=q.dtype)
    with bfloat16_products(q, k, v):
        for heads, rows in _pieces(queries):
            some = queries[heads, :, rows]
            weights = _probabilities(some.flatten(1, 2), keys[heads, : rows.stop], scale).to(v.dtype)
            out[heads, :, rows] = (weights @ values[heads, : rows.stop]).view(some.shape)
    return out.view(q.shape)


@torch.library.custom_op("llmprune::causal_attention_backward", mutates_args=(), device_types="cpu")
def causal_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in `q`, `k` and `v` from that in the output of `causal_attention`."""
    queries, keys, values = _by_group(q, k).float(), k.flatten(0, 1).float(), v.flatten(0, 1).float()
    grads = _by_group(grad, k).float()
    to_q, to_k, to_v = torch.empty_like(queries, dtype=q.dtype), torch.zeros_like(keys), torch.zeros_like(values)
    with bfloat16_products(grad, q, k, v):
        for heads, rows in _pieces(queries):
            shape, seen = queries[heads, :, rows].shape, (heads, slice(rows.stop))
            some, slopes = (x[heads, :, rows].flatten(1, 2) for x in (queries, grads))
            weights = _probabilities(some, keys[seen], scale)
            to_v[seen].baddbmm_(weights.mT, slopes)
            to_weights = slopes @ values[seen].mT
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, torch.float32).mul_(scale)
            to_k[seen].baddbmm_(to_scores.mT, some)
            to_q[heads, :, rows] = (to_scores @ keys[seen]).view(shape)
    return to_q.view(q.shape), to_k.view(k.shape).to(k.dtype), to_v.view(v.shape).to(v.dtype)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """`x` (batch, heads, tokens, width) as (batch * groups, heads / groups, tokens, width), contiguous."""
    return x.reshape(k.shape[0] * k.shape[1], -1, *x.shape[2:]).contiguous()


def _pieces(queries: Tensor) -> Iterator[tuple[slice, slice]]:
    """Which groups of heads, and which of their queries (groups, heads, tokens, width), are taken together."""
    groups, heads, tokens, _ = queries.shape
    together = max(SCORES // (heads * min(QUERIES, tokens) * tokens), 1)
    for group in range(0, groups, together):
        for row in range(0, tokens, QUERIES):
            yield slice(group, group + together), slice(row, min(row + QUERIES, tokens))


def _probabilities(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """What each of the last queries, (groups, heads * rows, width), takes of each of all keys, (groups, tokens, width)."""
    tokens = keys.shape[1]
    rows = (tokens - 1) % QUERIES + 1
    future = torch.full((rows, tokens), -math.inf).triu(tokens - rows + 1)
    return torch.baddbmm(future.repeat(queries.shape[1] // rows, 1), queries, keys.mT, alpha=scale).softmax(-1)


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@causal_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    to_q, to_k, to_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return to_q, to_k, to_v


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *causal_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


causal_attention.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.llmprune.causal_attention)
def _flops(q: torch.Size, *_: Any, **__: Any) -> int:
    """As torch counts its own attention: every score, masked or not."""
    return int(sdpa_flop_count(q, q, q))


@register_flop_formula(torch.ops.llmprune.causal_attention_backward)
def _flops_backward(grad: torch.Size, *_: Any, **__: Any) -> int:
    """Five products, where the output takes two."""
    return int(sdpa_flop_count(grad, grad, grad)) * 5 // 2
