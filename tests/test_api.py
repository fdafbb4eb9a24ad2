"""The public verbs: all in one place, under names that no room of the package takes from them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llmprune
from llmprune import api
from llmprune.base.errors import InputError
from llmprune.runs.compare import compare

ROOT = Path(llmprune.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
VERBS = sorted(set(api.__all__) - {"Result"})


def test_every_verb_is_public_documented_and_no_room() -> None:
    assert set(llmprune.__all__) == {*api.__all__, "InputError", "__version__"}
    for verb in VERBS:
        assert callable(getattr(llmprune, verb)), verb
        assert f"| `{verb}`" in str(api.__doc__) or f"`{verb}` |" in str(api.__doc__), verb
        assert f"llmprune.{verb}(" in (DOCS / "python.md").read_text(), verb
    rooms = {path.stem for path in ROOT.iterdir()}
    assert rooms.isdisjoint(VERBS), "a submodule would take the verb's place when it is imported"


def test_names_come_when_asked_for() -> None:
    code = "import sys, llmprune; print('torch' in sys.modules); llmprune.verify; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        _ = llmprune.prun


def test_one_name_is_as_good_as_a_list(folder: Path, tmp_path: Path) -> None:
    """A text is one name, not its letters."""
    llmprune.prune(
        folder, output=tmp_path / "out", sparsity="2:4", method="magnitude", calibration="pydoc", samples=2, seqlen=16
    )
    page = llmprune.report(tmp_path / "out", tmp_path / "page.html")
    assert [run["label"] for run in page["runs"]] == ["out"]
    assert (tmp_path / "page.html").is_file()
    found = llmprune.evaluate(tmp_path / "out", texts="pydoc", windows=2, seqlen=16)
    assert [score.name for score in found.scores] == ["token perplexity of pydoc"]
    cells = compare(folder, str(tmp_path / "cells.json"), methods="magnitude", patterns="2:4", samples=2, seqlen=16, windows=2)
    assert [(cell["method"], cell["sparsity"]) for cell in cells] == [("magnitude", "2:4")]


def test_what_names_nothing_is_one_line(tmp_path: Path) -> None:
    for call, why in (
        (lambda: llmprune.report([], tmp_path / "page.html"), "0 runs on one page"),
        (lambda: llmprune.report(tmp_path / "none", tmp_path / "page.html"), "does not exist"),
        (lambda: llmprune.compare("llama", tmp_path, methods="wanda"), "it is a folder"),
        (lambda: llmprune.compare("llama", tmp_path / "cells.json", methods="wand"), "did you mean wanda"),
    ):
        with pytest.raises(InputError, match=why):
            call()
