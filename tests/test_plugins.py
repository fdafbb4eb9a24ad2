"""One file is all that a new method takes: every other place finds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import tiny_model, tokens

import llmprune
from llmprune import solvers
from llmprune.base.errors import InputError
from llmprune.base.plugins import Plugins
from llmprune.cli.completion import completion
from llmprune.cli.parser import main_parser
from llmprune.solvers import METHODS

GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def test_the_guides_method_is_one_file(tmp_path: Path, saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of CONTRIBUTING.md, dropped into `solvers/`, prunes from folder to folder; command and completion offer it."""
    (example,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "of_the_guide.py").write_text(example)
    monkeypatch.setattr(solvers, "__path__", [*solvers.__path__, str(tmp_path / "methods")])
    assert "of_the_guide" in METHODS.names()
    assert "of_the_guide" in main_parser().format_help()
    assert "of_the_guide" in completion("bash")
    source, ids = saved(tiny_model("llama")), tokens(4, 16)
    record = llmprune.prune(source, output=tmp_path / "out", sparsity="2:4", calibration=ids, method="of_the_guide").record
    assert record.recipe["method"] == "of_the_guide"
    assert record.recipe["true_sequential"] is False
    assert record.zeros() == record.weights() / 2


def test_plugins_are_the_files_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "herd").mkdir()
    for name, text in {"__init__": "", "base": "broken =", "alpaca": "wool = 3", "vicuna": "broken ="}.items():
        (tmp_path / "herd" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    herd: Plugins = Plugins("herd", "animal")
    assert herd.names() == ["alpaca", "vicuna"]
    assert herd.get("alpaca").wool == 3
    with pytest.raises(InputError, match="unknown animal 'alpacca'; did you mean alpaca"):
        herd.get("alpacca")
    with pytest.raises(InputError, match="unknown animal 'base'"):
        herd.get("base")
