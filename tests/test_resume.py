"""A run that was killed goes on from its last finished block, and the files come out the same to the last bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from test_families import EXPERTS

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.files import sha256
from llmprune.job.progress import Progress
from llmprune.output import resume
from llmprune.output.verify import verify
from llmprune.runs import fingerprint

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


def unfinished(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def stopped(source: Path, out: Path, **changes: object) -> Path:
    """An unfinished run; returns its folder."""
    with pytest.raises(Killed):
        llmprune.prune(source, output=out, progress=KillAfter(10), **(OPTIONS | {"method": "wanda"} | changes))
    return unfinished(out)


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
        patch.setattr(fingerprint, "versions", lambda: {"torch": "0.1"})
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


# runs what each line of its input asks for in a process of its own; "kill" counts what is opened and renamed in the
# unfinished folder once a block is finished
_RUNS = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import tokens
import llmprune
from llmprune.cli.console import Progress

torch.set_num_threads(1)
options = {"sparsity": "2:4", "method": "sparsegpt", "calibration": tokens(8, 24), "batch_size": 4}

class Told(Progress):
    def note(self, text):
        print("note", text, flush=True)

    def site(self, site):
        print("solved", site.name, flush=True)

    def repeated(self, sites):
        print("repeated", sites, flush=True)

def run(partial, kill):
    def look(event, args):
        nonlocal kill
        if event in ("open", "os.rename") and partial in str(args[0]) and os.path.exists(partial + "/llmprune.partial.json"):
            kill -= 1
            if kill == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    llmprune.prune(sys.argv[2], output=out, progress=Told(), **options)

for line in sys.stdin:
    out, partial, kill = json.loads(line)
    child = os.fork()
    if not child:
        try:
            run(partial, kill)
            os._exit(0)
        finally:
            os._exit(1)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[int, list[str]]]]:
    """Another process that prunes a model of 8 blocks into a folder, and is killed, without warning, as it touches the
    unfinished folder for the `kill`-th time since a block is finished. Returns its exit code, and what it told.
    """
    home = tmp_path_factory.mktemp("killed")
    tiny_model("llama", num_hidden_layers=8).save_pretrained(home / "source")
    command = [sys.executable, "-c", _RUNS, str(Path(__file__).parent), str(home / "source")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(out: Path, kill: int = 0) -> tuple[int, list[str]]:
            print(json.dumps([str(out), str(unfinished(out)), kill]), file=process.stdin, flush=True)
            told: list[str] = []
            while not (line := process.stdout.readline()).startswith("exit"):
                assert line
                told.append(line.rstrip("\n"))
            return int(line.split()[1]), told

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(run_elsewhere, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run_elsewhere(out)[0] == 0
    return out


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(seed: int, whole: Path, run_elsewhere, tmp_path: Path) -> None:
    """A real process, killed again and again, never loses a finished block, and never solves it again."""
    chance, out, finished = random.Random(seed), tmp_path / "out", []
    for _ in range(3):
        assert run_elsewhere(out, chance.randrange(1, 30))[0] == -signal.SIGKILL
        blocks = json.loads((unfinished(out) / resume.MANIFEST).read_text())["blocks"]
        assert blocks[: len(finished)] == finished
        assert blocks
        finished = blocks
    code, told = run_elsewhere(out)
    assert code == 0
    assert f"note going on after block {len(finished)}, which an earlier run finished" in told
    record = json.loads((out / "llmprune.json").read_text())
    kept = [site for block in finished for site in block["sites"]]
    assert record["sites"][: len(kept)] == kept  # their seconds, too
    solved = [site["name"] for site in record["sites"][len(kept) :]]
    assert [line for line in told if line.startswith(("repeated", "solved"))] == (
        ["repeated 7"] * len(finished) + [f"solved {name}" for name in solved]
    )
    assert weights(out) == weights(whole)
    assert [path.name for path in tmp_path.glob(".*")] == []
