"""`llmprune compare`: cell by cell, going on where it stopped; the README's tables are what the results say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmprune.cli import main
from llmprune.comparison import _share, compare, papers_table
from llmprune.errors import InputError

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
    assert rows[1][1] == f"{first[0]['perplexity']:.2f}"
    with pytest.raises(InputError, match="was measured with samples 2, not 3: choose another file"):
        compare(["llama"], output, **(QUICK | {"samples": 3}))


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


@pytest.mark.parametrize(("arguments", "words"), [
    (["llama", "--methods", "wandda"], "did you mean wanda"),
    (["llama", "--sparsity", "4:2"], "4:2"),
    (["lama"], "did you mean llama"),
    (["llama", "--text", "nothing.txt"], "does not exist"),
    (["llama", "--output", "/nowhere/c.json"], "its folder does not exist"),
    (["llama", "--windows", "0"], "windows 0 is impossible"),
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


def test_the_tables_of_the_readme_are_generated() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "up to date")
