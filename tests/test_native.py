"""Products for CPUs against plain torch: every level of this CPU, kinds, densities, sizes; odd numbers and buffers; threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmprune.formats.kernels import bitmask, native
from llmprune.formats.kernels.bitmask import Bitmask
from llmprune.formats.layer import SparseLinear

ROOT = Path(__file__).parent.parent
HERE = native.library() is not None
compiled = pytest.mark.skipif(not HERE, reason="llmprune was installed without a compiler")
LEVELS = range(native.LEVELS.index(native.level()) + 1) if HERE else ()
SHAPES = [(8, 64), (33, 192), (9, 640), (1, 128)]
ODD = [(5, 7), (17, 65), (3, 100)]
TOKENS = (1, 2, 3, 5, 16, 17, 32, 45)


def matrix(rows: int, columns: int, density: float, kind: str, dtype: torch.dtype) -> Bitmask:
    """Of weights, or of codes in groups of 64 columns."""
    kept = torch.rand(rows, columns) < density
    if kind == "weights":
        return bitmask.pack(torch.where(kept, torch.randn(rows, columns), 0.0).to(dtype))
    bits = int(kind)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8) * kept
    return bitmask.pack(codes, (torch.rand(rows, columns // 64) + 0.5).to(dtype), bits)


def agree(found: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of what is put out, and of float32 sums."""
    x, w, ends = x.double(), w.double(), torch.zeros(len(w)) if bias is None else bias.double()
    exact, size = x @ w.T + ends, x.abs() @ w.abs().T + ends.abs()
    limit = (8e-3 if found.dtype == torch.bfloat16 else 2e-6) * size + 1e-30
    assert bool(((found.double() - exact).abs() <= limit).all())


def cases() -> Iterator[tuple[Bitmask, torch.dtype]]:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for shape, density, kind in product(SHAPES, (0.0, 0.1, 0.5, 0.7, 1.0), ("weights", "8", "4", "3")):
            yield matrix(*shape, density, kind, dtype), dtype
        for shape, density in product(ODD, (0.5, 1.0)):
            yield matrix(*shape, density, "weights", dtype), dtype


@compiled
@pytest.mark.parametrize("level", LEVELS)
def test_every_product_and_the_matrix_itself(level: int) -> None:
    for packed, dtype in cases():
        w = packed.weight()
        assert torch.equal(native.expand(packed, level), w)
        bias = torch.randn(packed.rows).to(dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, packed.columns).to(dtype)
            agree(native.multiply(x, packed, None, level), x, w)
            agree(native.multiply(x, packed, bias, level), x, w, bias)


@compiled
@pytest.mark.parametrize("level", LEVELS)
def test_the_same_whatever_the_threads(level: int) -> None:
    """To the last bit, and run after run."""
    threads = torch.get_num_threads()
    try:
        for kind, tokens in product(("weights", "4"), (1, 4, 40)):
            packed = matrix(200, 320, 0.5, kind, torch.bfloat16)
            x = torch.randn(tokens, 320).bfloat16()
            found = []
            for count in (1, 2, 3, 4, 2):
                torch.set_num_threads(count)
                found.append(native.multiply(x, packed, None, level))
            assert all(torch.equal(found[0], one) for one in found)
    finally:
        torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_plain_number(level: int, dtype: torch.dtype) -> None:
    """Infinity, NaN and -0.0, among weights and inputs, give what a dense product gives."""
    for tokens in (1, 3, 40):
        w = torch.where(torch.rand(16, 128) < 0.5, torch.randn(16, 128), 0.0).to(dtype)
        w[0, 3], w[1, 5], w[2, 7], w[3, :] = float("inf"), float("nan"), -0.0, -0.0
        x = torch.randn(tokens, 128).to(dtype)
        x[-1, 9] = float("inf")
        packed = bitmask.pack(w)
        assert torch.equal(native.expand(packed, level).view(torch.int16), w.view(torch.int16))
        found, expected = native.multiply(x, packed, None, level).double(), x.double() @ w.double().T
        for test in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(test(found), test(expected))


@compiled
def test_buffers_that_are_not_aligned() -> None:
    """As they are mapped from a file, at any byte."""
    packed = matrix(24, 192, 0.5, "4", torch.bfloat16)

    def moved(tensor: Tensor) -> Tensor:
        raw = torch.empty(tensor.nbytes + 64, dtype=torch.uint8)
        place = raw[tensor.element_size() :][: tensor.nbytes]
        place.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        return place.view(tensor.dtype).view(tensor.shape)

    other = Bitmask(*(moved(part) for part in (packed.mask, packed.values, packed.starts)), moved(packed.scale), 24, 192)
    for tokens in (1, 3):
        x = torch.randn(tokens, 192).bfloat16()
        assert torch.equal(native.multiply(x, packed, None), native.multiply(moved(x), other, None))


@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ with its sanitizers")
def test_no_byte_beyond_a_buffer_is_touched(tmp_path: Path) -> None:
    """By AddressSanitizer and UndefinedBehaviorSanitizer, over every level, kind, density and some sizes."""
    flags = ["-g", "-O1", "-std=c++17", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    program = tmp_path / "sanitized"
    subprocess.run(["g++", *flags, "-o", str(program), str(ROOT / "tests" / "sanitized.cpp")], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "good"), done.stdout + done.stderr


@compiled
@pytest.mark.parametrize("kind", ["weights", "4", "8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("fresh_compiler")
def test_the_layer_takes_any_inputs(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any shape, none at all, many, with gradients, not contiguous; compiled, it is one operation."""
    packed = matrix(48, 128, 0.5, kind, dtype)
    layer = SparseLinear(packed, torch.randn(48).to(dtype))
    w = layer.weight
    for shape in ((128,), (0, 128), (2, 3, 128), (70, 128), (2, 0, 128)):
        x = torch.randn(shape).to(dtype)
        assert layer(x).shape == (*shape[:-1], 48)
        agree(layer(x).view(-1, 48), x.view(-1, 128), w, layer.bias)
    x = torch.randn(128, 6).to(dtype).T
    agree(layer(x), x, w, layer.bias)
    with monkeypatch.context() as patch:  # more than are multiplied without expanding the matrix
        patch.setattr(native, "_INPUTS", 1)
        x = torch.randn(70, 128).to(dtype)
        agree(layer(x), x, w, layer.bias)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(x), layer(x))
    parts = (layer.mask, layer.values, layer.starts, layer.scale, layer.bias, layer.out_features, layer.in_features)
    torch.library.opcheck(torch.ops.llmprune.masked_linear, (x, *parts), test_utils=("test_schema", "test_faketensor"))


def test_without_what_was_compiled_it_is_slow_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.importlib.machinery, "EXTENSION_SUFFIXES", [".none"])
    native.library.cache_clear()
    try:
        packed = matrix(16, 128, 0.5, "4", torch.bfloat16)
        layer, x = SparseLinear(packed, None), torch.randn(3, 128).bfloat16()
        with pytest.warns(UserWarning, match="were not compiled, so sparse layers are slow: get g"):
            found = layer(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            assert torch.equal(layer(x), found)
        agree(found, x, packed.weight())
        assert native.level() == "none"
    finally:
        native.library.cache_clear()


def test_an_installation_without_a_compiler_succeeds(tmp_path: Path) -> None:
    """The extension is optional, and what is missing is only the compiled file."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "llmprune"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path / name)
    code = "from setuptools import build_meta as b; print(b.build_wheel('.'))"
    broken = {"PATH": str(tmp_path), "CC": "no-compiler", "CXX": "no-compiler", "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=broken, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "llmprune/formats/kernels/cpu/masked.cpp" in names
    assert not [name for name in names if "_masked" in name]
