"""Which road a packed product takes: measured once a shape, kept on disk. Roads and times are made up; no GPU is needed."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmprune.formats.kernels import cusparselt, dispatch, ops, reference
from llmprune.formats.kernels.reference import Packed

pytest.importorskip("triton")
from llmprune.formats.kernels import arrivals, roads

DTYPE = torch.bfloat16


def packed(rows: int = 16, columns: int = 32) -> Packed:
    w = torch.randn(rows, columns // 4, 4)
    w[..., 1:3] = 0
    return reference.pack(w.flatten(1).to(DTYPE))


class Device:
    """Roads that give the right result but for one that is wrong and one that raises, and what they are said to cost."""

    def __init__(self) -> None:
        self.seconds = {
            "gemv": lambda tokens: 3.0,
            "decode": lambda tokens: 1.0 * tokens,
            "decompress": lambda tokens: 20.0,
            "cusparselt": lambda tokens: 10.0,
        }
        self.host = 0.0  # what the host takes for a call of cuSPARSELt
        self.timed: list[tuple[str, int]] = []
        self.taken: list[str] = []
        self.capturing = False
        self.blob: Tensor | None = torch.ones(3, dtype=DTYPE)

    def road(self, name: str) -> roads.Road:
        def run(x: Tensor, own: Packed, bias: Tensor | None, blob: Tensor | None) -> Tensor:
            self.taken.append(name)
            return reference.linear24(x, own, bias)

        return run

    def time(self, calls: list, device: torch.device) -> float:
        calls[0]()
        name = self.taken[-1]
        self.timed.append((name, len(calls[0].args[0])))
        return self.seconds[name](len(calls[0].args[0]))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    own = Device()
    for name in ("gemv", "decode", "decompress", "cusparselt", "reference"):
        monkeypatch.setitem(roads.ROADS, name, own.road(name))
    monkeypatch.setattr(roads, "graph_seconds", own.time)
    monkeypatch.setattr(roads, "eager_seconds", lambda call, device: own.host)
    monkeypatch.setattr(dispatch, "_measurable", lambda packed: True)
    monkeypatch.setattr(dispatch, "_on", lambda device: nullcontext())
    monkeypatch.setattr(dispatch, "_blob", lambda packed: own.blob)
    monkeypatch.setattr(dispatch, "arena", lambda device: None)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_file", lambda device: tmp_path / "roads.json")
    monkeypatch.setattr(cusparselt, "_algorithms", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: own.capturing)
    dispatch._table.cache_clear()
    yield own
    dispatch._table.cache_clear()


def run(tokens: int, own: Packed, blob: Tensor | None) -> None:
    x = torch.randn(tokens, own.columns).to(DTYPE)
    torch.testing.assert_close(dispatch.linear24(x, own, None, blob), reference.linear24(x, own))


def test_each_shape_is_measured_once_for_all_numbers_of_tokens(device: Device) -> None:
    blob = dispatch.prepare(packed())
    assert blob is device.blob
    assert sorted(n for name, n in device.timed if name == "decode") == [1, 2, 4, 8, 16, 32, 64]
    assert sorted(n for name, n in device.timed if name == "cusparselt") == [2**i for i in range(13)]
    before = len(device.timed)
    for tokens, road in (
        (1, "decode"),
        (3, "decode"),
        (8, "decode"),
        (9, "cusparselt"),
        (70, "cusparselt"),
        (5000, "cusparselt"),
    ):
        run(tokens, packed(), blob)
        assert device.taken[-1] == road
        run(tokens, packed(), None)
        assert device.taken[-1] == ("decompress" if tokens > 32 else "decode")
    assert dispatch.prepare(packed()) is not None
    assert len(device.timed) == before
    dispatch.prepare(packed(32))
    assert len(device.timed) == 2 * before


def test_one_token_or_two_may_take_a_road_of_their_own(device: Device) -> None:
    device.seconds["gemv"] = lambda tokens: 0.5
    blob = dispatch.prepare(packed())
    assert [n for name, n in device.timed if name == "gemv"] == [1, 2]
    for tokens, road in ((1, "gemv"), (2, "gemv"), (3, "decode")):
        run(tokens, packed(), blob)
        assert device.taken[-1] == road


def test_what_the_host_takes_for_a_call_of_cusparselt_counts(device: Device) -> None:
    device.host = 15.0
    dispatch.prepare(packed())
    assert dispatch.roads_measured(packed(), 64)["cusparselt"] == 15.0
    device.host = 25.0
    assert dispatch.prepare(packed(32)) is None  # never the quickest


def test_what_was_measured_is_read_from_disk(device: Device, tmp_path: Path) -> None:
    device.seconds["cusparselt"] = lambda tokens: 30.0
    assert dispatch.prepare(packed()) is None  # never the quickest
    measured = dispatch.roads_measured(packed(), 8)
    assert measured == {"decode": 8.0, "decompress": 20.0, "cusparselt": 30.0}
    before = len(device.timed)
    stored = json.loads((tmp_path / "roads.json").read_text())
    assert stored["16 32 bfloat16 8"] == measured
    (tmp_path / "roads.json").write_text(json.dumps(stored | {"junk": {}, "1 2 int8 3": {}, "16 32 float16 8": [1]}))
    dispatch._table.cache_clear()
    assert dispatch.prepare(packed()) is None
    assert dispatch.roads_measured(packed(), 7) == measured
    assert len(device.timed) == before
    (tmp_path / "roads.json").write_text("[")
    dispatch._table.cache_clear()
    dispatch.prepare(packed())
    assert len(device.timed) == 2 * before


def test_a_road_that_is_wrong_or_fails_is_not_taken(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Tensor:
        raise RuntimeError("no kernel\n for this device")

    monkeypatch.setitem(roads.ROADS, "decode", fails)
    monkeypatch.setitem(roads.ROADS, "decompress", lambda x, own, bias, blob: torch.full((len(x), 16), float("nan")))
    measured = dispatch.roads_measured(packed(), 4, device.blob)
    assert measured["decode"] == "RuntimeError: no kernel for this device"
    assert str(measured["decompress"]).startswith("wrong: off by nan")
    run(4, packed(), device.blob)
    assert device.taken[-1] == "cusparselt"
    run(4, packed(), None)
    assert device.taken[-1] == "reference"


def test_a_device_without_memory_says_so(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(roads.ROADS, "decode", fails)
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.prepare(packed())


def test_nothing_is_measured_while_a_graph_is_captured(device: Device) -> None:
    device.capturing = True
    for tokens, road in ((64, "decode"), (65, "decompress")):
        run(tokens, packed(), None)
        assert device.taken[-1] == road
    assert not device.timed
    device.capturing = False
    run(64, packed(), None)
    assert device.taken[-1] == "decompress"  # nothing was remembered


def test_inputs_of_another_dtype_are_refused_as_by_a_dense_layer(device: Device) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        dispatch.linear24(torch.randn(2, 32), packed(), None)


def test_eager_calls_are_no_operation_unless_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls, x = packed(), [], torch.randn(2, 32).to(DTYPE)
    monkeypatch.setattr(ops, "linear24", lambda *_: calls.append("operation"))
    y = ops.product(x, own.values, own.meta, None, None, 32)
    assert torch.equal(y, reference.linear24(x, own))
    x.requires_grad_()
    with torch.no_grad():
        ops.product(x, own.values, own.meta, None, None, 32)
    assert not calls
    ops.product(x, own.values, own.meta, None, None, 32)
    assert calls == ["operation"]


class TestCusparselt:
    """Against what torch's operations are documented to take, as no CPU has them."""

    @pytest.fixture
    def library(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
        calls: list[tuple[str, int, int]] = []

        def multiply(blob: Tensor, x: Tensor, bias: Tensor | None, *, transpose_result: bool, alg_id: int) -> Tensor:
            assert transpose_result
            calls.append(("multiply", x.shape[1], alg_id))
            return torch.nn.functional.linear(x.t(), blob, bias)

        def search(blob: Tensor, x: Tensor, *, transpose_result: bool) -> int:
            assert transpose_result
            calls.append(("search", x.shape[1], 0))
            if x.shape[1] == 32:
                raise RuntimeError("none found")
            return 7

        monkeypatch.setattr(torch.ops.aten, "_cslt_sparse_mm", multiply)
        monkeypatch.setattr(torch.ops.aten, "_cslt_sparse_mm_search", search)
        monkeypatch.setattr(cusparselt, "_algorithms", {})
        return calls

    def test_an_algorithm_is_searched_once(self, library: list[tuple[str, int, int]]) -> None:
        blob, bias = torch.randn(16, 32), torch.randn(16)
        x = torch.randn(13, 32)
        torch.testing.assert_close(cusparselt.multiply(x, blob, bias), torch.nn.functional.linear(x, blob, bias))
        assert [cusparselt.search(torch.randn(n, 32), blob) for n in (16, 9, 32, 31)] == [7, 7, 0, 0]
        assert [name for name, *_ in library].count("search") == 2
        for tokens in (13, 17, 40):
            cusparselt.multiply(torch.randn(tokens, 32), blob, None)
        assert [call[1:] for call in library if call[0] == "multiply"] == [(16, 0), (16, 7), (24, 0), (40, 0)]

    def test_torch_has_the_operations(self) -> None:
        """Their shapes, from torch itself: the result comes as (tokens, rows), without a transposition."""
        blob, x = (torch.empty(size, dtype=DTYPE, device="meta") for size in ((16, 18), (24, 32)))
        y = cusparselt.multiply(x, blob, None)
        assert y.shape == (24, 16)
        assert y.is_contiguous()
        names = [own.name for own in torch.ops.aten._cslt_sparse_mm_search.default._schema.arguments]
        assert {"compressed_A", "dense_B", "transpose_result"} <= set(names)


class TestArrivals:
    """On a device that is made up: what launches share is decided by streams and captures alone."""

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
        state: dict[str, object] = {"capturing": False, "stream": 1, "made": 0}

        def zeros(number: int, **_: object) -> Tensor:
            state["made"] = state["made"] + 1  # type: ignore[operator]
            return zeros_(number)

        class Stream:
            cuda_stream = property(lambda self: state["stream"])

            def synchronize(self) -> None:
                pass

        zeros_ = torch.zeros
        monkeypatch.setattr(arrivals, "_SIZE", 40)
        monkeypatch.setattr(arrivals, "_STREAM", 12)
        for name in ("_arenas", "_used", "_streams"):
            monkeypatch.setattr(arrivals, name, {})
        monkeypatch.setattr(torch, "zeros", zeros)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
        return state

    def test_streams_and_captured_launches_have_their_own(self, gpu: dict[str, object]) -> None:
        device = torch.device("cuda", 0)

        def place(number: int) -> int:
            return arrivals.arrivals(device, number).data_ptr() - arrivals.arena(device).data_ptr()

        assert [place(5), place(12)] == [0, 0]  # launches of a stream follow each other
        gpu["stream"] = 2
        assert place(5) == 4 * 12
        gpu["capturing"] = True
        assert [place(5), place(6)] == [4 * 24, 4 * 32]  # aligned
        assert gpu["made"] == 1
        assert len(arrivals.arrivals(device, 30)) == 30  # more than there are: new ones
        gpu["capturing"] = False
        assert len(arrivals.arrivals(device, 13)) == 13
        assert gpu["made"] == 3

    def test_nothing_is_kept_that_was_made_in_a_graph(self, gpu: dict[str, object]) -> None:
        gpu["capturing"] = True
        assert not arrivals.arrivals(torch.device("cuda", 0), 5).any()
        assert not arrivals._arenas
