"""`llmprune compare`: cell by cell, going on where it stopped; the README's tables are what the results say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import tiny_model
from transformers import AutoTokenizer, PreTrainedModel

from llmprune.base.errors import InputError
from llmprune.cli.main import main
from llmprune.data.windows import Windows
from llmprune.job.record import Perplexity
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import BUNDLED
from llmprune.reports.comparison import Cells, papers_table, tables
from llmprune.reports.comparison_plot import _share
from llmprune.reports.sizes import best, by_size
from llmprune.reports.sizes import words as said
from llmprune.runs.compare import CHOICES, compare
from llmprune.runs.compare_texts import dense_perplexity
from llmprune.solvers import METHODS

ROOT = Path(__file__).parent.parent
QUICK = {"samples": 2, "seqlen": 64, "windows": 2, "device": "cpu"}
FLAGS = ["--samples", "2", "--seqlen", "64", "--windows", "2", "--device", "cpu"]


def test_cells_are_measured_once(tmp_path: Path) -> None:
    output, told = tmp_path / "found.json", list[str]()
    first = compare(["llama"], output, methods=["magnitude"], patterns=["2:4"], **QUICK, tell=told.append)
    again = compare(["llama"], output, methods=["magnitude", "wanda"], patterns=["0.5", "2:4"], **QUICK, tell=told.append)
    assert again[0] == first[0]
    assert [(cell["method"], cell["sparsity"]) for cell in again] == [
        ("magnitude", "2:4"), ("magnitude", "50%"), ("wanda", "50%"), ("wanda", "2:4"),
    ]  # fmt: skip
    assert len(told) == 4
    assert json.loads(output.read_text())["cells"] == again
    assert all(cell["perplexity"] > cell["dense"] > 1 for cell in again)
    ((model, header, rows),) = papers_table(again)
    assert (model, header[:3], rows[0][0]) == ("llama", ["method", "2:4", "50%"], "dense")
    assert {row[0]: row[1] for row in rows}["magnitude"] == f"{first[0]['perplexity']:.2f}"
    with pytest.raises(InputError, match="was measured with samples 2, not 3: choose another file"):
        compare(["llama"], output, **(QUICK | {"samples": 3}))


def test_the_dense_model_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several methods, by another process that goes on, and where a copy of the model is asked for."""
    shutil.copytree(BUNDLED["llama"], tmp_path / "copy")
    dense, pruned = list[float](), list[float]()

    def count(model: PreTrainedModel, windows: Windows) -> Perplexity:
        found = perplexity(model, windows)
        halved = (model.get_decoder().layers[0].mlp.up_proj.weight == 0).float().mean() > 0.4
        (pruned if halved else dense).append(found.value)
        return found

    def measure(model: Path | str, *methods: str) -> Cells:
        dense_perplexity.cache_clear()  # as another process begins
        return compare([model], tmp_path / "c.json", methods=methods, patterns=["2:4"], **QUICK)

    for module in ("compare", "compare_texts"):
        monkeypatch.setattr(f"llmprune.runs.{module}.perplexity", count)
    measure("llama", "magnitude", "wanda")
    measure("llama", "magnitude", "wanda", "ria")
    cells = measure(tmp_path / "copy", "dsnot")
    assert len(dense) == 1
    assert [cell["dense"] for cell in cells] == dense * 4
    assert [cell["perplexity"] for cell in cells] == pruned
    assert [cell["excess_loss"] for cell in cells] == [math.log(value / dense[0]) for value in pruned]


def test_the_command_prints_the_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "c.json"
    arguments = ["compare", "llama", "--methods", "magnitude", "--sparsity", "2:4", "50%", "2:4", *FLAGS]
    assert main([*arguments, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    for words in ("dense", "magnitude", "50%", "token perplexity, held-out pydoc", f"wrote {output}"):
        assert words in shown
    assert output.with_suffix(".md").read_text().count("| llama | 2:4 | magnitude |") == 1
    assert output.with_suffix(".svg").read_text().count("magnitude") >= 2


def test_models_are_told_apart_by_their_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    folders = [tmp_path / place / "same" for place in "abc"]
    for seed, folder in enumerate(folders[:2]):
        tiny_model("llama", seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    shutil.copytree(folders[0], folders[2])
    output, quick = tmp_path / "c.json", QUICK | {"methods": ["magnitude"], "patterns": ["2:4"]}
    compare([str(folders[0])], output, **quick)
    cells = compare([str(folder) for folder in folders], output, **quick)  # the second is none of what was measured
    assert [cell["model"] for cell in cells] == [str(folder) for folder in folders[:2]]
    assert cells[0]["perplexity"] != cells[1]["perplexity"]
    assert [name for name, *_ in papers_table(cells)] == [str(folder) for folder in folders[:2]]
    assert [name for name, *_ in papers_table(cells[:1])] == ["same"]
    shutil.rmtree(folders[0])
    folders[1].rename(folders[0])
    with pytest.raises(InputError, match=r"other weights of .*/a/same: choose another file"):
        compare([str(folders[0])], output, **quick)


def test_every_draw_is_a_cell_and_tables_show_their_spread(tmp_path: Path) -> None:
    output, quick = tmp_path / "c.json", QUICK | {"methods": ["wanda"], "patterns": ["2:4"]}
    one = compare(["llama"], output, **quick)
    two = compare(["llama"], output, **quick, seeds=2)
    assert two[0] == one[0]
    assert [cell["seed"] for cell in two] == [0, 1]
    a, b = (cell["excess_loss"] for cell in two)
    assert a != b
    spread = f"{(a + b) / 2:.4f} ± {abs(a - b) / 2**0.5:.4f}"
    assert f"| wanda | {spread} |" in tables(two)
    assert f" | {spread} | " in output.with_suffix(".md").read_text()
    assert "±" not in tables(one)


@pytest.mark.parametrize(("change", "words"), [
    ({"device": "NVIDIA H100"}, "device NVIDIA H100, not cpu"),
    ({"threads": 77}, "threads 77, not"),
    ({"versions": {"torch": "1.0"}}, "version of .*: choose another file"),
])  # fmt: skip
def test_what_was_measured_elsewhere_is_not_mixed_in(change: dict, words: str, tmp_path: Path) -> None:
    output, quick = tmp_path / "c.json", QUICK | {"methods": ["magnitude"], "patterns": ["2:4"]}
    compare(["llama"], output, **quick)
    output.write_text(json.dumps(json.loads(output.read_text()) | change))
    with pytest.raises(InputError, match=words):
        compare(["llama"], output, **quick)


def test_the_default_is_every_method_and_preset() -> None:
    assert set(CHOICES) == {*METHODS.names(), "fast", "balanced", "best", "max"}


@pytest.mark.parametrize(("arguments", "words"), [
    (["llama", "--methods", "wandda"], "did you mean wanda"),
    (["llama", "--sparsity", "4:2"], "4:2"),
    (["lama"], "did you mean llama"),
    (["llama", "--text", "nothing.txt"], "does not exist"),
    (["llama", "--output", "/nowhere/c.json"], "its folder does not exist"),
    (["llama", "--windows", "0"], "windows 0 is impossible"),
    (["llama", "--seeds", "0"], "seeds 0 is impossible"),
])  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", arguments[0], *FLAGS, *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"cells": 3}')
    with pytest.raises(InputError, match="is no comparison: choose another file"):
        compare(["llama"], tmp_path / "x.json", **QUICK)
    assert (tmp_path / "x.json").read_text() == '{"cells": 3}'


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("50%", 0.5), ("1:4", 0.75), ("62.5%", 0.625)])
def test_shares_of_patterns(pattern: str, share: float) -> None:
    assert _share(pattern) == share


def test_cells_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bits a weight are those of the files, what is dense and not rounded loses nothing, and a file goes on."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 32}
    for saved in (tiny_model("llama", vocab_size=len(tokenizer), **sizes).bfloat16(), tokenizer):
        saved.save_pretrained("tiny")
    asked = ["compare", "./tiny", *FLAGS, "--output", "sizes.json", "--methods", "magnitude"]
    asked += ["--sparsity", "dense", "2:4", "--bits"]
    assert main([*asked, "16", "4"]) == 0
    shown = capsys.readouterr().out
    cells = json.loads(Path("sizes.json").read_text())["cells"]
    found = {(cell["sparsity"], cell["bits"]): cell for cell in cells}
    assert list(found) == [("dense", 16), ("dense", 4), ("2:4", 16), ("2:4", 4)]
    assert (found["dense", 16]["excess_loss"], found["dense", 16]["bits_per_weight"]) == (0, 16)
    assert found["2:4", 16]["bits_per_weight"] == 9
    assert found["dense", 4]["bits_per_weight"] == pytest.approx(4 + 16 / 128, abs=0.01)
    assert 2.9 < found["2:4", 4]["bits_per_weight"] <= 1 + 4 / 2 + 16 / 128
    assert 0 < abs(found["dense", 4]["excess_loss"]) < abs(found["2:4", 16]["excess_loss"])
    assert all(cell["excess_loss"] == math.log(cell["perplexity"] / cell["dense"]) for cell in cells)
    assert "Least loss for their bytes, bits a weight and nats: " in shown
    assert Path("sizes.svg").read_text().count("2:4 magnitude, 4 bits") == 1
    assert main([*asked, "16", "4", "8"]) == 0
    again = json.loads(Path("sizes.json").read_text())["cells"]
    assert again[:4] == cells
    assert [(cell["sparsity"], cell["bits"]) for cell in again[4:]] == [("dense", 8), ("2:4", 8)]
    capsys.readouterr()
    assert main(asked[:-1]) == 2
    assert "sparsity 'dense' is not a pattern" in capsys.readouterr().err


def test_what_is_best_for_its_bytes() -> None:
    def cell(pattern: str, bits: int, size: float, loss: float) -> dict:
        shared = {
            "model": "m",
            "checkpoint": "c",
            "seed": 0,
            "dense": 20.0,
            "perplexity": 20.0 * math.exp(loss),
            "seconds": 1.0,
        }
        own = {"method": "none" if pattern == "dense" else "fast", "sparsity": pattern, "bits": bits}
        return shared | own | {"bits_per_weight": size, "excess_loss": loss}

    sized = [
        ("dense", 16, 16.0, 0.0),
        ("dense", 3, 3.13, 0.02),
        ("2:4", 4, 3.12, 0.05),
        ("2:4", 16, 9.0, 0.05),
        ("70%", 4, 2.3, 0.1),
    ]
    (models,) = by_size([cell(*one) for one in sized]).values()
    assert [one.label for one in models] == ["70% fast, 4 bits", "2:4 fast, 4 bits", "dense, 3 bits", "2:4 fast", "dense"]
    assert [one.label for one in best(models)] == ["70% fast, 4 bits", "2:4 fast, 4 bits", "dense, 3 bits", "dense"]
    first, *rest = said(models)
    assert first.startswith("Least loss for their bytes, bits a weight and nats: 70% fast, 4 bits (2.30, 0.1000); ")
    assert rest == [
        "Beaten by a dense model of no more bytes: 2:4 fast, 4 bits (3.12, 0.0500) by dense, 3 bits (3.13, 0.0200); "
        "2:4 fast (9.00, 0.0500) by dense, 3 bits (3.13, 0.0200)."
    ]


def test_bits_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "llama", "--bits", "5", "--output", str(tmp_path / "c.json")]) == 2
    assert "bits 5 is impossible: give 8, 4, 3 or 16, which is not rounded" in capsys.readouterr().err
    assert not (tmp_path / "c.json").exists()
