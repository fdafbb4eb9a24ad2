"""`scripts/gpu_check.py`: all pieces at tiny sizes on a CPU, and what its rows promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import gpu_check  # noqa: E402
from gpu.rows import Results, Row  # noqa: E402
from gpu.sweep import better  # noqa: E402

from llmprune.formats.kernels import plan  # noqa: E402
from llmprune.formats.kernels.plan import SETTINGS, Settings  # noqa: E402

HEADER = {"date": "2026-01-01", "device": "cpu", "versions": {"torch": "1"}}
FOREVER = float("inf")


def results(path: Path, *, end: float = FOREVER, retry: bool = False, header: dict | None = None) -> Results:
    return Results(path, header or HEADER, torch.device("cpu"), end=end, retry=retry)


def counted(calls: list[str], *, wrong: bool = False) -> list[Row]:
    def fail() -> dict:
        calls.append("bad")
        if wrong:
            raise RuntimeError("out of\nluck")
        return {"value": 2}

    def good() -> dict:
        calls.append("good")
        return {"value": 1}

    return [Row("bad", fail), Row("good", good)]


def test_a_failure_costs_one_row_and_is_measured_again_only_when_asked(tmp_path):
    path, calls = tmp_path / "gpu_x.json", []
    results(path).measure(counted(calls, wrong=True))
    kept = json.loads(path.read_text())["rows"]
    assert kept["bad"]["raised"] == "RuntimeError: out of luck"
    assert kept["good"]["value"] == 1
    results(path).measure(counted(calls))
    assert calls == ["bad", "good"]
    results(path, retry=True).measure(counted(calls))
    assert calls == ["bad", "good", "bad"]
    assert json.loads(path.read_text())["rows"]["bad"]["value"] == 2


def test_what_there_is_no_time_for_is_left(tmp_path):
    calls: list[str] = []
    late = results(tmp_path / "gpu_x.json", end=0.0)
    late.measure(counted(calls))
    assert (calls, late.left) == ([], ["bad", "good"])


def test_a_file_of_another_device_is_not_mixed_in(tmp_path):
    path = tmp_path / "gpu_x.json"
    results(path).measure(counted([]))
    with pytest.raises(SystemExit, match="another device"):
        results(path, header=HEADER | {"device": "gpu"})


def test_the_plan_lists_rows_and_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--plan", "--output", str(tmp_path)])
    assert gpu_check.main() == 0
    assert {"checks", "prune", "  8B, 2 blocks, balanced"} <= set(capsys.readouterr().out.splitlines())
    assert not list(tmp_path.iterdir())


def test_what_a_sweep_found_clearly_faster_becomes_the_table(tmp_path):
    def row(default: float, *best: tuple[Settings, float]) -> dict:
        return {"default": default, "best": [asdict(own) | {"seconds": seconds, "rate": 1.0} for own, seconds in best]}

    wide = Settings(rows=64, warps=4)
    found = better({
        "compile": {"seconds": 3.0},
        "256x512 x 1": {"default": 9.0, "best": [{"rows": 8, "warps": 1, "chunks": 1, "seconds": 1.0}]},  # another kernel's
        "256x512 x 8": row(2.0, (wide, 1.0), (SETTINGS[8], 1.2)),
        "256x512 x 16": row(2.0, (wide, 1.0), (SETTINGS[16], 1.01)),  # within what two sweeps differ by
        "256x512 x 32": row(1.1, (wide, 1.0)),
        "best of all shapes x 8": {"best": []},
        "256x512 x 64": {"raised": "RuntimeError: out of luck"},
    })  # fmt: skip
    assert found == {(256, 512, 8): wide, (256, 512, 32): wide}
    plan.write(found, tmp_path / "table.json")
    assert plan.read(tmp_path / "table.json") == found


def test_every_piece_runs_at_tiny_sizes(tmp_path):
    pieces = ("checks", "sweep", "layers", "solvers", "e2e")
    command = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--small", "--only", *pieces, "--output", str(tmp_path)]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for piece in pieces:
        found = json.loads((tmp_path / f"gpu_{piece}.json").read_text())
        assert found["device"] == "cpu, interpreted"
        assert found["rows"]
        assert not [row for row in found["rows"].values() if "raised" in row]
