"""What becomes of the work when what it prints can no longer be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmprune.base.errors import MachineError
from llmprune.base.folders import check_output
from llmprune.cli.main import main
from llmprune.output.verify import verify

FULL = Path("/dev/full")
OPTIONS = ["--sparsity", "2:4", "--method", "magnitude", "--samples", "2", "--seqlen", "16", "--calibration", "t.txt"]
needs_full = pytest.mark.skipif(not FULL.exists(), reason="Linux's file that is always full")


@pytest.fixture
def command(folder: Path) -> list[str]:
    (folder.parent / "t.txt").write_text(" ".join(map(str, range(400))))
    return ["--model", str(folder), *OPTIONS, "--output", "out"]


def test_a_reader_that_goes_does_not_end_the_work(python: list[str], command: list[str], tmp_path: Path) -> None:
    """As `llmprune ... | head -0`: the pipe breaks at the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*python, "-m", "llmprune", *command], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert verify(tmp_path / "out").problems == ()


def test_standard_output_may_be_closed(tmp_path: Path) -> None:
    """As by `>&-` in a shell."""
    command = 'exec "$0" -m llmprune verify nosuch >&-'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=tmp_path, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, b"llmprune: error: folder nosuch does not exist\n")


@needs_full
def test_standard_output_that_is_full_is_told_and_the_work_is_done(
    python: list[str], command: list[str], tmp_path: Path
) -> None:
    with FULL.open("wb") as full:
        done = subprocess.run([*python, "-m", "llmprune", *command], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE)
    told = b"llmprune: error: standard output cannot be written (No space left on device); the work is done\n"
    assert (done.returncode, done.stderr) == (3, told)
    assert verify(tmp_path / "out").problems == ()


@needs_full
def test_json_that_cannot_be_written_names_its_file_and_the_model(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--json", str(FULL)]) == 3
    assert capsys.readouterr().err == "llmprune: error: cannot write /dev/full: No space left on device; out is complete\n"
    assert verify(tmp_path / "out").problems == ()


def test_a_place_that_cannot_be_written_is_the_machine_s_fault(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as on a read-only disk
    with pytest.raises(MachineError, match="is read-only; choose another"):
        check_output(tmp_path / "out", None, False)
    assert main(command) == 3
    assert capsys.readouterr().err.startswith("llmprune: error: cannot write output out: ")
