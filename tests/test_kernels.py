"""Packed 2:4 matrices: the layout against a naive twin, kernels against it in Triton's interpreter, and as compiled code."""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.formats.kernels import dispatch, reference
from llmprune.formats.kernels.ops import linear24
from llmprune.formats.kernels.plan import BY_SHAPE, MOST, SETTINGS, Rows, Settings, choose, plan, shared_memory
from llmprune.formats.kernels.reference import POSITIONS, Packed

triton = pytest.importorskip("triton")
from llmprune.formats.kernels import bits, decode, decompress, gemv  # noqa: E402

HALF = (torch.bfloat16, torch.float16)
SHAPES = [(7, 260), (130, 1024), (33, 12), (64, 776), (1, 4)]


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A 2:4 matrix with groups of two, one and no nonzeros, and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = scale * torch.randn(rows, columns // 4, 4, generator=generator)
    kept = (
        torch.rand(w.shape, generator=generator).argsort(-1)
        < torch.tensor([2, 2, 2, 1, 0])[torch.randint(5, (rows, columns // 4, 1), generator=generator)]
    )
    w = torch.where(kept, w, 0.0).flatten(1).to(dtype)
    w[rows // 2] = 0
    return w


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.dtype.itemsize == 2 else torch.int32)


def naive(packed: Packed) -> Tensor:
    """Unpacked entry by entry, from the words' definition."""
    rows, chunks, words = packed.meta.shape
    dense = torch.zeros(rows, 4 * 8 * chunks * words, dtype=packed.values.dtype)
    for row, chunk, word, plane in itertools.product(range(rows), range(chunks), range(words), range(8)):
        group = chunk * 8 * words + plane * words + word
        for value, place in enumerate(POSITIONS[(int(packed.meta[row, chunk, word]) >> (4 * plane)) & 15]):
            dense[row, 4 * group + place] = packed.values[row, 2 * group + value]
    return dense[:, : packed.columns]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(3, 260), (2, 12), (5, 512)])
def test_layout_is_the_documented_one(dtype: torch.dtype, rows: int, columns: int) -> None:
    w = matrix(rows, columns, dtype)
    packed = reference.pack(w)
    assert torch.equal(naive(packed), w)
    assert packed.values.shape[1] * 2 == packed.meta[0].numel() * 32
    assert int(packed.meta.min()) >= 0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*HALF, torch.float32]), st.integers(1, 4), st.integers(1, 140), st.integers(0, 2**32))
def test_packing_loses_no_bit(dtype: torch.dtype, rows: int, groups: int, seed: int) -> None:
    """Any bits, infinity and negative zeros included; NaN stays NaN. At most two entries of a group are not +0."""
    generator = torch.Generator().manual_seed(seed)
    width = 8 * dtype.itemsize
    integer = torch.int16 if width == 16 else torch.int32
    shape = (rows, groups, 4)
    bits_ = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), shape, generator=generator).to(integer)
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 6e-8, -1.0]).to(dtype).view(integer)
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    bits_ = torch.where(torch.rand(shape, generator=generator) < 0.5, bits_, chosen)
    kept = torch.rand(shape, generator=generator).argsort(-1) < 2
    w = torch.where(kept, bits_, 0).to(integer).flatten(1).view(dtype)
    found = reference.unpack(reference.pack(w))
    assert torch.equal(found.isnan(), w.isnan())
    assert torch.equal(bits_of(found)[~w.isnan()], bits_of(w)[~w.isnan()])


def test_a_third_negative_zero_becomes_a_positive_one() -> None:
    w = torch.tensor([[1.0, -0.0, 2.0, -0.0, -0.0, -0.0, -0.0, 3.0]])
    found = reference.unpack(reference.pack(w))
    assert torch.equal(found, w)
    assert found.signbit().tolist() == [[False, False, False, False, True, False, False, False]]


@pytest.mark.parametrize(("w", "words"), [
    (torch.tensor([[0, 0, 0, 0], [1.0, 0, 2, 3]]), "row 1, columns 0 to 3: 3 nonzeros, 2 allowed"),
    (torch.ones(2, 6), "its width of 6 columns is not a multiple of 4"),
])  # fmt: skip
def test_what_is_not_two_of_four_is_refused(w: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reference.pack(w)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("tile", [1, 2**20])
def test_the_reference_is_a_dense_product(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_TILE", tile)
    w, x, bias = matrix(33, 260, dtype), torch.randn(2, 5, 260).to(dtype), torch.randn(33).to(dtype)
    found = reference.linear24(x, reference.pack(w), bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, w, bias))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel is given holds NaN, so that what it leaves unwritten is seen."""
    empty = torch.empty

    def filled(*args: object, **options: object) -> Tensor:
        return empty(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", filled)


DEVICE = {"shared": 227 * 1024, "fast": False}
RUNS = [  # rows, columns, tokens, multiprocessors
    (1, 4, 1, 40), (7, 260, 3, 1), (33, 12, 64, 1), (64, 776, 33, 2), (64, 776, 17, 40), (66, 1024, 8, 1), (66, 776, 16, 1),
    (66, 776, 1, 40), (33, 776, 33, 2),
]  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("rows", "columns", "tokens", "processors"), RUNS)
def test_decode_is_the_reference(
    dtype: torch.dtype, rows: int, columns: int, tokens: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice to the same bits, with counters that the first launch has left as it found them; with a bias and without."""
    counters = torch.zeros(99, dtype=torch.int32)
    monkeypatch.setattr(decode, "arrivals", lambda device, number: counters[:number])
    w, packed = matrix(rows, columns, dtype), reference.pack(matrix(rows, columns, dtype))
    generator = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, columns), (rows,)))
    own = None if processors == 2 else bias
    found = [decode.decode24(x, packed.values, packed.meta, own, processors=processors, **DEVICE) for _ in range(2)]
    expected = x.double() @ w.double().T + (0 if own is None else own.double())
    for y in found:
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3, atol=1e-2)
    assert torch.equal(bits_of(found[0]), bits_of(found[1]))
    assert not counters.any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("rows", "columns", "own"), [(1, 4, None), (7, 260, None), (33, 776, Rows(8, 4, 8)), (5, 2048, Rows(4, 1, 1))]
)
@pytest.mark.parametrize("tokens", [1, 2])
def test_gemv_is_the_reference(dtype: torch.dtype, rows: int, columns: int, own: Rows | None, tokens: int) -> None:
    w, packed = matrix(rows, columns, dtype), reference.pack(matrix(rows, columns, dtype))
    generator = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, columns), (rows,)))
    for added in (bias, None):
        y = gemv.gemv24(x, packed.values, packed.meta, added, fast=False, settings=own)
        expected = x.double() @ w.double().T + (0 if added is None else added.double())
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3, atol=1e-2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("scale", "input_"), [(1e-6, 1.0), (3e4, 1 / 512)])
def test_decode_of_extreme_values(dtype: torch.dtype, scale: float, input_: float) -> None:
    """Sums are of 32 bits: only what is stored at the end can overflow, and subnormal values count."""
    w = matrix(16, 512, dtype, scale=scale).clamp(-6e4, 6e4)
    packed, x = reference.pack(w), torch.full((2, 512), input_).to(dtype)
    found = decode.decode24(x, packed.values, packed.meta, None, processors=4, **DEVICE)
    expected = x.double() @ w.double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("own", [Settings(rows=64), Settings(joined=True, waves=1), Settings(rows=16, waves=2)])
def test_decode_takes_settings(own: Settings) -> None:
    w = matrix(66, 776, torch.float16)
    packed, x = reference.pack(w), torch.randn(9, 776).half()
    found = decode.decode24(x, packed.values, packed.meta, None, processors=2, settings=own, **DEVICE)
    torch.testing.assert_close(found.double(), x.double() @ w.double().T, rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures("poisoned")
def test_a_block_is_not_summed_before_all_its_programs_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program is left out: its block stays unwritten, and its counter shows who is waiting."""
    counters = torch.zeros(3, dtype=torch.int32)
    monkeypatch.setattr(decode, "arrivals", lambda device, number: counters[:number])
    monkeypatch.setattr(decode, "plan", lambda *own: replace(plan(*own), programs=plan(*own).programs - 1))
    packed, x = reference.pack(matrix(66, 776, torch.float16)), torch.randn(1, 776).half()
    found = decode.decode24(x, packed.values, packed.meta, None, processors=1, settings=Settings(waves=6), **DEVICE)
    assert counters.tolist() == [0, 0, 1]
    assert found.isnan().nonzero()[:, 1].tolist() == [64, 65]


def test_decode_of_too_many_tokens() -> None:
    packed = reference.pack(torch.zeros(4, 4).half())
    with pytest.raises(ValueError, match="65 tokens, where the decode kernel takes 64 at most"):
        decode.decode24(torch.zeros(65, 4).half(), packed.values, packed.meta, None, processors=4, **DEVICE)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40000), st.integers(1, 64), st.sampled_from([8, 16]), st.integers(1, MOST), st.integers(1, 160),
    st.sampled_from([48, 64, 99, 163, 227]),
)  # fmt: skip
def test_a_plan_deals_out_all_tiles_in_one_wave(
    rows: int, chunks: int, words: int, tokens: int, processors: int, kib: int
) -> None:  # fmt: skip
    own = plan(rows, chunks, words, tokens, processors, kib * 1024)
    tiles = own.blocks * chunks
    assert (own.blocks - 1) * own.settings.rows < rows <= own.blocks * own.settings.rows
    assert (own.programs - 1) * own.each < tiles <= own.programs * own.each
    assert own.programs <= own.settings.waves * processors
    starts = {start // chunks for start in range(0, tiles, own.each) if start % chunks}
    assert own.shares == bool(starts)
    assert own.settings.stages == 1 or shared_memory(own.settings, words, tokens) <= kib * 1024


def test_settings_by_shape_are_taken_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Settings(rows=64, stages=4)
    monkeypatch.setitem(BY_SHAPE, (4096, 4096, 8), own)
    assert choose(4096, 8, 16, 5, 227 * 1024) == own
    assert choose(4096, 8, 16, 9, 227 * 1024) == SETTINGS[16]
    assert choose(4096, 8, 16, 5, 99 * 1024) == replace(SETTINGS[8], stages=2)
    monkeypatch.setitem(SETTINGS, 8, replace(SETTINGS[8], waves=4))
    assert choose(4096, 8, 16, 5, 99 * 1024) == replace(SETTINGS[8], stages=2, waves=3)  # as many as have room
    assert choose(4096, 8, 16, 5, 16 * 1024).stages == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_decompress_gives_every_bit(dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = matrix(rows, columns, dtype)
    packed, empty = reference.pack(w), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
    found = decompress.decompress24(packed.values, packed.meta, columns, fast=False)
    assert torch.equal(bits_of(found), bits_of(w))


def permute(a: int, b: int, selector: int) -> int:
    """PTX's prmt.b32, without sign replication, which no selector here asks for."""
    bytes_ = [(word >> (8 * i)) & 255 for word in (a, b) for i in range(4)]
    nibbles = [(selector >> (4 * i)) & 15 for i in range(4)]
    assert all(nibble < 8 for nibble in nibbles)
    return sum(bytes_[nibble] << (8 * i) for i, nibble in enumerate(nibbles))


def run_ptx(text: str, inputs: list[int]) -> list[int]:
    """The few instructions that the kernel's assembly has; the operands after the eight outputs are the inputs."""
    registers: dict[str, int] = {f"${8 + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    for statement in text.strip().strip("{}").split(";"):
        words = re.split(r"[ ,]+", statement.strip())
        if words[0] == "mov.b32":
            registers[words[1]] = value(words[2])
        elif words[0] == "prmt.b32":
            registers[words[1]] = permute(*map(value, words[2:]))
        else:
            assert words[0] in ("", ".reg")
    return [registers[f"${i}"] for i in range(8)]


def test_the_assembly_expands_every_code() -> None:
    generator = torch.Generator().manual_seed(0)
    for codes in itertools.product(range(6), repeat=4):
        halves = [pair.tolist() for pair in torch.randint(1, 2**16, (4, 2), generator=generator)]
        word = sum(code << (4 * i) for i, code in enumerate(codes)) | 0x55550000
        found = run_ptx(bits._PRMT.value, [word, *(low | high << 16 for low, high in halves)])
        for i, (code, pair) in enumerate(zip(codes, halves, strict=True)):
            group = [0, 0, 0, 0]
            for place, half in zip(POSITIONS[code], pair, strict=True):
                group[place] = half
            assert found[2 * i : 2 * i + 2] == [group[0] | group[1] << 16, group[2] | group[3] << 16]


def as_float(word: int) -> float:
    return struct.unpack("f", struct.pack("I", word))[0]


def as_word(number: float) -> int:
    return struct.unpack("I", struct.pack("f", number))[0]


def run_picking(text: str, inputs: list[int]) -> float:
    """As `run_ptx`, with the one output $0, and what is done to numbers besides."""
    registers = {f"${1 + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    for statement in text.strip().strip("{}").split(";"):
        name, *words = re.split(r"[ ,]+", statement.strip())
        if name == "mov.b32":
            registers[words[0]] = value(words[1])
        elif name == "prmt.b32":
            registers[words[0]] = permute(*map(value, words[1:]))
        elif name == "shl.b32":
            registers[words[0]] = value(words[1]) << value(words[2]) & 0xFFFFFFFF
        elif name == "and.b32":
            registers[words[0]] = value(words[1]) & value(words[2])
        elif name == "fma.rn.f32":
            a, b, c = (as_float(value(word)) for word in words[1:])
            registers[words[0]] = as_word(a * b + c)
        else:
            assert name in ("", ".reg"), statement
    return as_float(registers["$0"])


def test_the_assembly_picks_the_inputs_of_every_code() -> None:
    """Four groups of bfloat16: small whole numbers, so that sums are exact."""
    generator = torch.Generator().manual_seed(0)
    for codes in itertools.product(range(6), repeat=4):
        pairs = torch.randint(-8, 9, (4, 2), generator=generator).tolist()
        inputs = torch.randint(-8, 9, (4, 4), generator=generator).tolist()
        word = sum(code << (4 * i) for i, code in enumerate(codes)) | 0x55550000

        def packed(low: float, high: float) -> int:
            return as_word(low) >> 16 | as_word(high) & 0xFFFF0000

        halves = [packed(*pair) for pair in pairs]
        groups = [half for x in inputs for half in (packed(x[0], x[1]), packed(x[2], x[3]))]
        found = run_picking(bits._PICK_BFLOAT16.value, [as_word(3.0), word, *halves, *groups])
        expected = sum(
            own * x[place]
            for code, pair, x in zip(codes, pairs, inputs, strict=True)
            for own, place in zip(pair, POSITIONS[code], strict=True)
        )
        assert found == 3.0 + expected


@pytest.mark.usefixtures("fresh_compiler")
def test_the_operation_is_a_good_citizen() -> None:
    packed, bias = reference.pack(matrix(12, 260, torch.float32)), torch.randn(12)
    for x in (torch.randn(3, 260), torch.randn(2, 1, 260)):
        torch.library.opcheck(linear24, (x, packed.values, packed.meta, bias, None, 260))
    with pytest.raises(RuntimeError, match="inputs of 256 columns for a matrix of 260"):
        torch.compile(linear24, backend="aot_eager")(torch.randn(3, 256), packed.values, packed.meta, None, None, 260)


def test_without_triton_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dispatch.has_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed: packed 2:4 layers run on slow paths"):
        assert not dispatch.has_triton()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.has_triton()
    dispatch.has_triton.cache_clear()


COMPILE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from kernel_facts import DEVICES, decompress_facts, facts
from llmprune.formats.kernels.plan import choose

for capability, tokens, words, kind in ((80, 8, 16, "bf16"), (80, 16, 8, "bf16"), (90, 8, 16, "fp16"), (90, 32, 16, "bf16")):
    own = choose(4096, 8, words, tokens, (DEVICES[capability][1] - 1) * 1024)
    print(json.dumps({"tokens": tokens} | facts(own, tokens, capability, words=words, kind=kind)))
for capability in DEVICES:
    print(json.dumps({"tokens": 0} | decompress_facts(capability)))
"""


def test_kernels_compile_for_two_generations_without_spilling() -> None:
    """With the compiler that comes with Triton, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(Path(__file__).parents[1] / "scripts")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["tokens"] for row in found] == [8, 16, 8, 32, 0, 0]
    for row in found:
        assert row["spilled"] == 0, row
        if row["tokens"]:
            assert row["shared"] <= row["asked"], row
            assert row["programs"] >= 2, row
            assert row["in_flight"], row
        if row["tokens"] == 8:
            assert row["instructions_a_chunk"] <= 660, row
