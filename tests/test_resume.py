"""A run that was killed goes on from its last finished block, and the files come out the same to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from test_families import EXPERTS

import llmprune
from llmprune.errors import InputError
from llmprune.integrity import verify
from llmprune.report.console import Progress
from llmprune.stream import resume
from llmprune.stream.publish import sha256

IDS = tokens(6, 24)
OPTIONS = {"sparsity": "2:4", "calibration": IDS, "batch_size": 2}


class Killed(BaseException):
    """Stands in for a signal."""


class KillAfter(Progress):
    def __init__(self, sites: int) -> None:
        self.left, self.notes = sites, []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def site(self, site: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.name not in ("llmprune.json", "README.md")}


@pytest.mark.parametrize("recipe", [{"method": "wanda"}, {"quality": "balanced"}, {"quality": "best"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_goes_on_to_the_same_files(family: str, recipe: dict, saved, tmp_path: Path) -> None:
    """From a bfloat16 checkpoint computed in float32, so that a lost rounding would show."""
    source = saved(tiny_model(family, **EXPERTS.get(family, {})).to(torch.bfloat16))
    whole = llmprune.prune(source, output=tmp_path / "whole", **OPTIONS, **recipe).record
    sites = len(whole.sites)
    out = tmp_path / "out"
    for killer in (KillAfter(sites // 2), KillAfter(sites // 3 + 2)):
        with pytest.raises(Killed):
            llmprune.prune(source, output=out, progress=killer, **OPTIONS, **recipe)
        assert not out.exists()
    last = KillAfter(10**6)
    record = llmprune.prune(source, output=out, progress=last, **OPTIONS, **recipe).record
    assert last.notes[0] == "going on after block 2, which an earlier run finished"
    assert weights(out) == weights(tmp_path / "whole")
    assert verify(out).problems == ()
    assert not (tmp_path / ".out.partial").exists()
    for mine, other in zip(record.sites, whole.sites, strict=True):
        assert (mine.name, mine.error, mine.sparsity, mine.tokens) == (other.name, other.error, other.sparsity, other.tokens)
    assert [one.after for one in record.reconstructions] == [one.after for one in whole.reconstructions]
    assert record.size == whole.size


def stopped(source: Path, out: Path, **changes: object) -> Path:
    """An unfinished run; returns its folder."""
    with pytest.raises(Killed):
        llmprune.prune(source, output=out, progress=KillAfter(10), **(OPTIONS | {"method": "wanda"} | changes))
    return out.parent / f".{out.name}.partial"


@pytest.mark.parametrize(("changes", "words"), [
    ({"sparsity": "50%"}, r"--sparsity 2:4 \(now 50%\)"),
    ({"method": "magnitude"}, r"--method wanda \(now magnitude\)"),
    ({"calibration": tokens(6, 24, seed=1)}, "calibration text"),
    ({"skip": ["*.o_proj"]}, "--skip"),
    ({"dtype": "bfloat16"}, "--dtype"),
])  # fmt: skip
def test_another_run_is_not_mixed_in(changes: dict, words: str, saved, tmp_path: Path) -> None:
    source, out = saved(tiny_model("llama")), tmp_path / "out"
    stopped(source, out)
    with pytest.raises(InputError, match=words):
        llmprune.prune(source, output=out, **(OPTIONS | {"method": "wanda"} | changes))
    llmprune.prune(source, output=out, restart=True, **(OPTIONS | {"method": "wanda"} | changes))
    assert verify(out).problems == ()


def test_another_model_or_version_is_not_mixed_in(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = saved(tiny_model("llama")), tmp_path / "out"
    stopped(source, out)
    with monkeypatch.context() as patch:
        patch.setattr(llmprune.pipeline, "versions", lambda: {"torch": "0.1"})
        with pytest.raises(InputError, match=r"version of python 3.* \(now None\)"):
            llmprune.prune(source, output=out, method="wanda", **OPTIONS)
    saved(tiny_model("llama", seed=1))
    with pytest.raises(InputError, match="with other settings: model"):
        llmprune.prune(source, output=out, method="wanda", **OPTIONS)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda text: text[: len(text) // 2], "is not JSON"),
    (lambda text: text.replace('"nonzero": [', '"nonzero": [1'), "is damaged"),
    (lambda text: json.dumps({"blocks": []}), "is damaged"),
    (lambda text: "[]", "not a JSON object"),
])  # fmt: skip
def test_a_damaged_manifest_is_an_error(damage, words: str, saved, tmp_path: Path) -> None:
    source, out = saved(tiny_model("llama")), tmp_path / "out"
    manifest = stopped(source, out) / resume.MANIFEST
    manifest.write_text(damage(manifest.read_text()))
    with pytest.raises(InputError, match=f"{words}.*--restart"):
        llmprune.prune(source, output=out, method="wanda", **OPTIONS)
    assert manifest.exists()


def test_a_damaged_shard_is_an_error(saved, tmp_path: Path) -> None:
    source, out = saved(tiny_model("llama")), tmp_path / "out"
    shard = next(stopped(source, out).glob("model-00001*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="missing or damaged"):
        llmprune.prune(source, output=out, method="wanda", **OPTIONS)


def test_what_an_aborted_start_left_is_not_published(saved, tmp_path: Path) -> None:
    source, out = saved(tiny_model("llama")), tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "tokenizer.json").write_text("of another model")
    llmprune.prune(source, output=out, method="wanda", **OPTIONS)
    assert not (out / "tokenizer.json").exists()


_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import tokens
import llmprune
print("ready", flush=True)
options = {"sparsity": "2:4", "method": "sparsegpt", "calibration": tokens(48, 60), "batch_size": 1}
llmprune.prune(sys.argv[2], output=sys.argv[3], **options)
"""


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(seed: int, saved, tmp_path: Path) -> None:
    """A real process, killed without warning again and again."""
    source = saved(tiny_model("llama", num_hidden_layers=12))
    run = [sys.executable, "-c", _RUN, str(Path(__file__).parent), str(source)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*run, str(tmp_path / "whole")], check=True, env=env, stdout=subprocess.DEVNULL)
    chance, out, kills = random.Random(seed), tmp_path / "out", 0
    while not out.exists() and kills < 4:
        process = subprocess.Popen([*run, str(out)], env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0.1, 2.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    if not out.exists():
        subprocess.run([*run, str(out)], check=True, env=env, stdout=subprocess.DEVNULL)
    assert kills >= 1
    assert weights(out) == weights(tmp_path / "whole")
    assert [path.name for path in tmp_path.glob(".*")] == []
