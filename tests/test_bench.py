"""What `llmprune bench` measures and says; and the GPU script, proven on the CPU."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from test_sparse import pruned

import llmprune
from llmprune.base.errors import InputError
from llmprune.cli.main import main
from llmprune.formats.kernels.native import library
from llmprune.measure import speed
from llmprune.measure.bench import LayerTime, ModelTime, advice, bench
from llmprune.measure.speed import side_by_side

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured need not be precise here: turns are short, and little is copied."""
    monkeypatch.setattr(speed, "_LEAST", speed._LEAST / 10)
    monkeypatch.setattr(speed, "_COPIED", {"cpu": 2**20})


def test_every_shape_and_batch_is_measured(saved, tmp_path: Path) -> None:
    told: list[str] = []
    found = bench(saved(pruned("llama")), device="cpu", tokens=(1, 3), batches=(1, 2), length=8, tell=told.append)
    shapes = {(one.rows, one.columns): one.layers for one in found.layers}
    single = {(48, 32): 6, (32, 48): 3, (32, 32): 6, (16, 32): 6}
    fused = {(96, 32): 3, (64, 32): 3, (32, 48): 3, (32, 32): 3}  # gate and up, and q, k and v, as one
    assert shapes == (fused if library() else single)
    assert len(found.layers) == 8
    assert all(one.dense > 0 and one.packed > 0 for one in (*found.layers, *found.model))
    assert [(one.phase, one.batch, one.tokens) for one in found.model] == [
        ("prefill", 1, 8), ("decode", 1, 1), ("prefill", 2, 16), ("decode", 2, 2),
    ]  # fmt: skip
    wide = next(one for one in found.layers if one.columns == 48)
    assert wide.dense_bytes == 32 * 48 * 2
    assert "Dense is the quicker of bfloat16 and float32" in found.advice[1]
    dense = llmprune.load(tmp_path / "source", device="cpu", dense=True)
    assert 2 * dense.num_parameters() <= found.weights["dense"] <= 2 * dense.num_parameters() + 100  # rotary frequencies
    assert set(told) >= {"layer 32 x 48", "whole model, batch 2"}
    json.dumps(found.as_dict())


def test_two_sides_are_timed_turn_about() -> None:
    order: list[str] = []
    seconds = side_by_side([lambda: order.append("a"), lambda: order.append("b")], torch.device("cpu"), turns=2)
    assert len(seconds) == 2
    changes = sum(x != y for x, y in pairwise(order))
    assert changes == 5  # warm-ups aa bb, then a.. b.. a.. b..


def test_advice_names_what_helps_and_what_does_not() -> None:
    sizes = {"dense": 100, "packed": 60}
    layers = [LayerTime(64, 64, 2, 1, 1.0, 1.2, 1, 1), LayerTime(4096, 4096, 2, 1, 2.0, 1.0, 1, 1)]
    whole = [ModelTime("decode", 1, 1, 1.4, 1.0), ModelTime("decode", 8, 8, 1.0, 1.0), ModelTime("prefill", 1, 512, 0.9, 1.0)]
    said = "\n".join(advice(torch.device("cuda"), layers, whole, sizes))
    assert "Decode is faster: 1.40x at batch 1." in said
    assert "does not speed up decode at batch 8 (1.00x)" in said
    assert "does not speed up prefill at batch 1 (0.90x)" in said
    assert "Layers that are slower than dense in decode: 64 x 64." in said
    assert "60%" in said


def test_the_command_prints_tables_and_writes_json(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(pruned("llama"))
    arguments = ["bench", str(source), "--tokens", "1", "2", "3", "--batches", "1", "--length", "4", "--device", "cpu"]
    assert main([*arguments, "--json", str(tmp_path / "bench.json")]) == 0
    shown = capsys.readouterr().out
    assert 0 <= shown.index("Dense is the quicker") < shown.index("32 x 48 (3)") < shown.index("--full shows the others")
    saved_ = json.loads((tmp_path / "bench.json").read_text())
    assert {one["tokens"] for one in saved_["layers"]} == {1, 2, 3}
    assert main([*arguments, "--full"]) == 0
    full = capsys.readouterr().out
    assert "--full" not in full
    assert full.count("│") - shown.count("│") == 8 * len({(one["rows"], one["columns"]) for one in saved_["layers"]})
    assert main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == saved_.keys()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--tokens", "0"], "must be at least 1"),
    (["--length", "-3"], "must be at least 1"),
    (["--json", "/nowhere/at/all.json"], "its folder does not exist"),
    (["--device", "cuda"], "device 'cuda' cannot be used here"),
    (["--dtype", "int4"], "unknown dtype 'int4'"),
    (["--token", "1"], "did you mean --tokens"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], words: str, saved, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(saved(pruned("llama")))
    capsys.readouterr()
    assert main(["bench", source, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_dense_model_has_nothing_to_bench(saved) -> None:
    with pytest.raises(InputError, match=r"no layer of .* is packed or 2:4: prune it with --sparsity 2:4, or pack"):
        bench(saved(tiny_model("llama")), device="cpu")


def test_commands_that_convert(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, packed, back = str(saved(pruned("llama", skip=("o_proj",)))), str(tmp_path / "p"), str(tmp_path / "b")
    assert main(["pack", source, packed]) == 0
    shown = capsys.readouterr().out
    assert "18 matrices packed" in shown
    assert (
        "dense  model.layers.0.self_attn.o_proj: 100% of it is not zero, so that a mask and the rest would take more" in shown
    )
    assert "9.00 bits a weight" in shown
    assert main(["verify", packed]) == 0
    assert main(["unpack", packed, back]) == 0
    assert "18 matrices unpacked" in capsys.readouterr().out
    assert main(["pack", source, packed]) == 2
    assert main(["pack", source, packed, "--overwrite"]) == 0
    assert main(["unpack", source, back]) == 2


def test_a_folder_called_as_the_bundled_model_is(
    saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model has its name; what is written and said next is the folder's, and its blanks are quoted."""
    source = str(saved(pruned("llama")))
    monkeypatch.chdir(tmp_path)
    assert main(["pack", source, "./llama"]) == 0
    assert "\n  llmprune bench ./llama\n" in capsys.readouterr().out
    for act in (bench, lambda name: llmprune.pack(name, "out")):
        with pytest.raises(InputError, match=r"\(a folder here of that name is ./llama\) (is packed or 2:4|would get smaller)"):
            act("llama")
    assert len(bench(Path("llama"), device="cpu", tokens=(1,), batches=(), length=4).layers) == 4
    assert main(["pack", source, "a b"]) == 0
    assert "\n  llmprune bench 'a b'\n" in capsys.readouterr().out
