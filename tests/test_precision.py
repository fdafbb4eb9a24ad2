"""What a user allows models to round does not reach statistics and solvers, and stays as it was set."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from llmprune.base.clock import Clock
from llmprune.base.precision import full_float32
from llmprune.job.recipes import QUALITIES
from llmprune.models.sites import Site
from llmprune.numerics.patterns import NM
from llmprune.numerics.stats import CrossGram, Gram, InputSample
from llmprune.steps.weights.batching import Batch
from llmprune.steps.weights.observing import Observed
from llmprune.steps.weights.sharing import Share

CPU, WIDTH = torch.device("cpu"), 256  # of narrower ones some CPUs compute nothing in bfloat16
CUDA, MKLDNN = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
pytestmark = pytest.mark.skipif(not hasattr(MKLDNN, "fp32_precision"), reason="this torch has one setting only")


def _set(owner: object, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


WAYS: dict[str, Callable[[], None]] = {
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": _set(CUDA, "allow_tf32", True),
    "cuda tf32": _set(CUDA, "fp32_precision", "tf32"),
    "cpu bf16": _set(MKLDNN, "fp32_precision", "bf16"),
    "all of torch": _set(torch.backends, "fp32_precision", "tf32"),
    "nothing": lambda: None,
}


def newer() -> tuple[str, ...]:
    return (torch.backends.fp32_precision, CUDA.fp32_precision, MKLDNN.fp32_precision)


def settings() -> tuple[str, ...]:
    """As they are, the older one included, which torch tells only beside newer ones that agree."""
    now = newer()
    CUDA.fp32_precision = MKLDNN.fp32_precision = "ieee"
    older = torch.get_float32_matmul_precision()
    CUDA.fp32_precision, MKLDNN.fp32_precision = now[1:]
    return (older, *now)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Each way begins where torch does."""

    def reset() -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = CUDA.fp32_precision = MKLDNN.fp32_precision = "none"

    reset()
    yield
    reset()


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(seed))


def solved() -> list[torch.Tensor]:
    """All that a stage is solved by."""
    seen = Observed(Gram(WIDTH, CPU), InputSample(2), CrossGram(WIDTH, CPU), Clock())
    seen.add(inputs(1), inputs(1) + 0.1 * inputs(2))
    w = inputs(3)[:128]
    site = Site("m", torch.nn.Linear(WIDTH, 128), "m.weight", False, torch.float32)
    found = Share(Batch([[site]], [seen], NM(2, 4)), 0, 128).solve([w], QUALITIES["balanced"])
    lost = torch.tensor(seen.sample.errors(w, found.weight), dtype=torch.float64)
    return [seen.statistic.sum, seen.cross.sum, found.weight, lost]


@pytest.mark.parametrize("way", WAYS)
def test_a_solve_is_the_same_bit_for_bit_and_the_setting_as_before(way: str) -> None:
    expected = solved()
    WAYS[way]()
    before = settings()
    for one, other in zip(solved(), expected, strict=True):
        assert torch.equal(one, other)
    assert settings() == before


@pytest.mark.parametrize("way", WAYS)
def test_within_it_everything_says_full_and_an_error_puts_it_back(way: str) -> None:
    WAYS[way]()
    before = settings()

    def fail() -> None:
        with full_float32(), full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not CUDA.allow_tf32  # torch raises where older and newer settings contradict each other
            assert newer()[1:] == ("ieee", "ieee")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert settings() == before


def test_a_backend_goes_on_following_all_of_torch() -> None:
    torch.backends.fp32_precision = "tf32"
    with full_float32():
        pass
    torch.backends.fp32_precision = "ieee"
    assert newer() == ("ieee", "ieee", "ieee")


def test_medium_does_change_products_here_outside() -> None:
    """Else the tests above would show nothing."""
    a, b = inputs(1), inputs(2)
    exact = a.T @ b
    torch.set_float32_matmul_precision("medium")
    if torch.equal(a.T @ b, exact):
        pytest.skip("this CPU has no bfloat16 instructions")
    with full_float32():
        assert torch.equal(a.T @ b, exact)
