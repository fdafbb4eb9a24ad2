"""SparseGPT's sweep, recorded once and replayed on other columns, as a CUDA graph is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmprune.numerics.patterns import NM, Pattern, Stacked, Unstructured
from llmprune.numerics.stats import Gram
from llmprune.solvers import sparsegpt

PATTERNS = [Unstructured(0.5), NM(2, 4), NM(1, 3), NM(7, 150), Stacked(NM(2, 4), (8, 16)), Stacked(Unstructured(0.5), (8, 16))]


class FakeGraph(TorchDispatchMode):
    """Stands in for a CUDA graph on the CPU: `replay` runs the recorded operations again, on the same memory."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        FakeGraph.made += 1
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def _capture(graph: FakeGraph) -> Iterator[None]:
    with graph:
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    FakeGraph.made = 0
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(sparsegpt, "_worth_recording", lambda w, width: True)
    return FakeGraph


def problem(columns: int, device: str = "cpu") -> tuple[torch.Tensor, Gram]:
    generator = torch.Generator().manual_seed(columns)
    mix = torch.randn(columns, columns, generator=generator)
    x, w = torch.randn(3 * columns, columns, generator=generator) @ mix, torch.randn(24, columns, generator=generator)
    x[:, ::7] = 0
    gram = Gram(columns, torch.device(device))
    gram.add(x.to(device))
    return w.to(device), gram


def plain(w: torch.Tensor, gram: Gram, pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(sparsegpt, "_worth_recording", lambda w, width: False)
        return sparsegpt.solve(w, gram, pattern).weight


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_replaying_gives_the_same_bits(pattern: Pattern, graphs: type[FakeGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block is narrower, and is swept as it is."""
    w, gram = problem(600 if pattern.period in (1, 3, 150) else 700)
    expected = plain(w, gram, pattern, monkeypatch)
    assert graphs.made == 0
    assert torch.equal(sparsegpt.solve(w, gram, pattern).weight, expected)
    assert graphs.made == 1


@pytest.mark.parametrize("fail", [
    lambda graph: _refuse("no capture here"),
    lambda graph: _after(lambda: _refuse("capture was invalidated")),
], ids=["at once", "at its end"])  # fmt: skip
def test_where_it_cannot_be_recorded_it_is_run(
    fail: Callable[..., Any], graphs: type[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph", fail)
    w, gram = problem(600)
    assert torch.equal(sparsegpt.solve(w, gram, NM(2, 4)).weight, plain(w, gram, NM(2, 4), monkeypatch))
    assert graphs.made == 1, "and is tried once"


def _refuse(why: str) -> None:
    raise RuntimeError(why)


@contextmanager
def _after(end: Callable[[], None]) -> Iterator[None]:
    yield
    end()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_on_a_gpu_it_is_recorded(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    w, gram = problem(600 if pattern.period in (1, 3, 150) else 700, "cuda")
    wt = w.T.contiguous()
    whole = sparsegpt.Columns(wt, torch.ones_like(wt, dtype=torch.bool), torch.zeros_like(wt), gram.factor.upper)
    block = whole.part(0, 128 // pattern.period * pattern.period or pattern.period)
    block.clone().sweep(pattern)
    assert sparsegpt.record(block, pattern) is not None
    expected = plain(w, gram, pattern, monkeypatch)
    off = (sparsegpt.solve(w, gram, pattern).weight - expected).norm() / expected.norm()
    assert off < 0.02, "products may be summed in another order, and a near tie turn"
