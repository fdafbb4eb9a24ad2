"""The Hub, by the real client against a small one on localhost: pushing, reading back, and everything that can go wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from hub import TOKEN, Hub, Repository, add, running
from huggingface_hub import constants, metadata_load, snapshot_download
from huggingface_hub.utils import disable_progress_bars, logging
from transformers import AutoTokenizer

import llmprune
from llmprune.base.errors import InputError, MachineError
from llmprune.base.files import sha256
from llmprune.cli.main import main
from llmprune.models.resolve import BUNDLED, resolve
from llmprune.output import hub as pushing

IDS = tokens(2, 12)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned folder."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder / "source")
    (folder / "source" / "README.md").write_text("---\nlicense: llama3.2\nlicense_link: LICENSE\nbad: 1\n---\ntheirs")
    llmprune.prune(folder / "source", output=folder / "out", sparsity="2:4", method="magnitude", calibration=tokens(4, 16))
    return folder / "out"


@pytest.fixture
def folder(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "out"))


@pytest.fixture
def packed(dense: Path, tmp_path: Path) -> Path:
    return llmprune.pack(dense, tmp_path / "packed").output


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A small Hub that this process's client talks to, signed in, without waiting between attempts."""
    disable_progress_bars()
    logging.set_verbosity_error()
    with running(Hub()) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(pushing, "_WAITS", (0.0,) * 3)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield found


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """For a fresh process."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    return {**os.environ, **own, "HF_HOME": str(tmp_path / "home")}


def contents(folder: Path) -> dict[str, bytes]:
    """What a push is to send: every file, and of the record a version without the folders of what the tests name."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(files["llmprune.json"])
    for part in filter(None, (record["arguments"], record["calibration"], record["dense"], record["pruned"])):
        part |= {key: Path(value).name for key, value in part.items() if str(value).startswith("/")}
    return files | {"llmprune.json": (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()}


def pushed(hub: Hub, name: str, branch: str = "main") -> dict[str, bytes]:
    return {path: data for path, data in hub.files(name, branch).items() if path != ".gitattributes"}


def test_push_twice_sends_large_files_once(folder: Path, hub: Hub) -> None:
    told: list[str] = []
    url = llmprune.push(folder, "me/tiny", tell=told.append)
    assert url == f"{hub.endpoint}/me/tiny/commit/{hub.repositories['me/tiny'].branches['main']}"
    assert pushed(hub, "me/tiny") == contents(folder)
    assert len(hub.asked("PUT /objects")) == len(list(folder.glob("*.safetensors")))
    assert len(hub.asked("POST .*/commit/")) == 1
    assert not hub.repositories["me/tiny"].private
    hub.requests.clear()
    assert llmprune.push(folder, "me/tiny", tell=told.append) == url
    assert told[-1] == "me/tiny holds all of it already"
    assert not hub.asked("PUT|/commit/")


READ_BACK = """
import sys
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained("me/dense", output_loading_info=True)
assert not any(info.values()), info
assert "llmprune" not in sys.modules
torch.save(model.state_dict(), "dense.pt")
import llmprune
torch.save(llmprune.load("me/packed", device="cpu", dense=True).state_dict(), "packed.pt")
"""


def test_what_was_pushed_reads_back_bit_for_bit(folder: Path, packed: Path, hub: Hub, tmp_path: Path) -> None:
    """The dense one with plain transformers, before anything of ours is imported."""
    for name, pushed in {"dense": folder, "packed": packed}.items():
        llmprune.push(pushed, f"me/{name}", private=True)
        assert hub.repositories[f"me/{name}"].private
    run, env = [sys.executable, "-c", READ_BACK], environment(hub, tmp_path)
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    for name, pushed in {"dense": folder, "packed": packed}.items():
        here = llmprune.load(pushed, device="cpu", dense=True).state_dict()
        there = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_codes_read_back_packed_and_not(dense: Path, hub: Hub, tmp_path: Path) -> None:
    asked = {"sparsity": "2:4", "method": "magnitude", "bits": 8, "rounding": "nearest", "calibration": tokens(4, 16)}
    llmprune.prune(dense.parent / "source", output=tmp_path / "codes", **asked)
    llmprune.pack(tmp_path / "codes", tmp_path / "small")
    here = llmprune.load(tmp_path / "codes", dense=True).state_dict()
    for name in ("codes", "small"):
        llmprune.push(tmp_path / name, f"me/{name}")
        assert pushed(hub, f"me/{name}") == contents(tmp_path / name)
        there = llmprune.load(f"me/{name}", dense=True).state_dict()
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here)


def test_the_command_in_a_fresh_process(folder: Path, hub: Hub, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "llmprune", "push", str(folder), "me/tiny", "--private", "--create-pr"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment(hub, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"pushed {folder}: {hub.endpoint}/me/tiny/discussions/1"
    assert pushed(hub, "me/tiny") == {}
    assert pushed(hub, "me/tiny", "refs/pr/1") == contents(folder)
    assert hub.repositories["me/tiny"].private


def test_processes_push_once(source: Path, hub: Hub, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmprune"]
    run = ["--model", str(source), "--sparsity", "2:4", "--method", "wanda", "--samples", "4", "--seqlen", "64"]
    run += ["--calibration", str(tmp_path / "text.txt"), "--eval-text", "none", "--output", str(tmp_path / "out")]
    env = environment(hub, tmp_path) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *run, "--push-to-hub", "me/tiny"], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pushed: ") == 1
    assert pushed(hub, "me/tiny") == contents(tmp_path / "out")
    assert len(hub.asked("POST .*/commit/")) == 1


def test_a_branch_is_made(folder: Path, hub: Hub) -> None:
    for _ in range(2):
        assert main(["push", str(folder), "me/tiny", "--revision", "sparse"]) == 0
    assert pushed(hub, "me/tiny") == {}
    assert pushed(hub, "me/tiny", "sparse") == contents(folder)


def test_weights_of_an_earlier_push_go(folder: Path, packed: Path, hub: Hub) -> None:
    """Else a loader would find both."""
    llmprune.push(folder, "me/tiny")
    hub.repositories["me/tiny"].commit(hub.files("me/tiny") | {"picture.png": b"", "other/model.safetensors": b""})
    llmprune.push(packed, "me/tiny")
    assert pushed(hub, "me/tiny") == contents(packed) | {"picture.png": b"", "other/model.safetensors": b""}


def test_the_card_says_what_the_hub_asks_for(folder: Path, packed: Path) -> None:
    facts = metadata_load(folder / "README.md")
    assert facts == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmprune", "pruned", "sparse", "magnitude"],
        "license": "llama3.2",
        "license_link": "LICENSE",
    }
    assert metadata_load(packed / "README.md") == facts | {"library_name": "llmprune"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama with the bundled tokenizer, to prune."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(" ".join(str(n) for n in range(3000)))
    return tmp_path / "source"


def test_prune_from_the_hub_and_push(source: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a pinned revision to a repository whose card says how to make it again, to the last byte."""
    commit = add(hub, "acme/tiny", source)
    add(hub, "acme/tiny", BUNDLED["llama"])
    monkeypatch.chdir(tmp_path)  # the card names the text without its folder
    text = str(tmp_path / "text.txt")
    run = ["--sparsity", "50%", "--method", "magnitude", "--samples", "4", "--seqlen", "64", "--calibration", text]
    run += ["--eval-text", text, "--no-true-sequential", "--skip", "*.q_proj", "*.k_proj"]
    out = str(tmp_path / "a")
    assert main(["--model", f"acme/tiny@{commit}", *run, "--output", out, "--push-to-hub", "me/tiny"]) == 0
    assert pushed(hub, "me/tiny") == contents(tmp_path / "a")
    hub.requests.clear()
    again = ["--model", f"acme/tiny@{commit}", *run, "--output", out, "--push-to-hub", "me/again"]
    assert main(again) == 0  # it is complete: only pushed
    assert pushed(hub, "me/again") == contents(tmp_path / "a")
    assert not [request for request in hub.requests if "acme/tiny" in request]
    facts = metadata_load(tmp_path / "a" / "README.md")
    assert (facts["base_model"], facts["base_model_relation"]) == ("acme/tiny", "finetune")
    (results,) = facts["model-index"]
    assert results["name"] == "tiny"
    assert [metric["type"] for metric in results["results"][0]["metrics"]] == ["perplexity", "perplexity"]
    card = (tmp_path / "a" / "README.md").read_text()
    assert 'from_pretrained("me/tiny")' in card
    (line,) = [line for line in card.splitlines() if line.startswith("llmprune --model")]
    again = [word.strip("'") for word in line.split()[1:]]
    assert again[:2] == ["--model", f"acme/tiny@{commit}"]
    assert main([*again, "--output", str(tmp_path / "b")]) == 0
    for shard in (tmp_path / "a").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()


def test_files_in_folders_are_pushed_and_read_back(source: Path, hub: Hub) -> None:
    """What a tokenizer with several chat templates keeps in one; other formats of the weights stay where they are."""
    out, templates = source.parent / "out", {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(source)
    (source / "onnx").mkdir()
    for name in ("model.safetensors", "config.json", "README.md"):
        (source / "onnx" / name).write_text("other")
    add(hub, "acme/tiny", source)
    calibration = {"calibration": tokens(4, 16), "method": "magnitude"}
    llmprune.prune("acme/tiny", sparsity="2:4", output=out, push_to_hub="me/tiny", **calibration)
    assert not (resolve("acme/tiny").path / "onnx").exists()
    assert AutoTokenizer.from_pretrained(resolve("me/tiny").path).chat_template == templates
    assert llmprune.verify(resolve("me/tiny").path).problems == ()
    llmprune.push(llmprune.pack(out, source.parent / "packed").output, "me/packed")
    assert AutoTokenizer.from_pretrained(resolve("me/packed").path).chat_template == templates
    assert llmprune.verify(resolve("me/packed").path).problems == ()


def test_a_push_that_cannot_go_well_costs_no_work(source: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"model": source, "sparsity": "2:4", "calibration": tokens(4, 16), "output": source.parent / "out"}
    with pytest.raises(InputError, match="'tiny' is no repository id: give user/name"):
        llmprune.prune(**run, push_to_hub="tiny")
    with pytest.raises(InputError, match="pushes the output folder: name one"):
        llmprune.prune(**run | {"output": None}, push_to_hub="me/tiny")
    hub.tokens[TOKEN] = "read"
    with pytest.raises(InputError, match="the token may only read"):
        llmprune.prune(**run, push_to_hub="me/tiny")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no token is there"):
        llmprune.prune(**run, push_to_hub="me/tiny")
    assert not (source.parent / "out").exists()


def test_a_push_that_fails_leaves_the_pruned_folder(source: Path, hub: Hub) -> None:
    """Pushing to a repository is no part of what decides the result: the same command goes on, or another name is given."""
    out = source.parent / "out"
    run = {"model": source, "sparsity": "2:4", "method": "magnitude", "calibration": tokens(4, 16), "output": out}
    with pytest.raises(InputError, match=r"403 .* is complete, and `llmprune push .*/out acme/tiny` pushes it later"):
        llmprune.prune(**run, push_to_hub="acme/tiny")
    assert main(["verify", str(out)]) == 0
    llmprune.push(out, "me/tiny")


def test_a_push_that_fails_names_a_command_to_paste(source: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    run = {"model": source, "sparsity": "2:4", "method": "magnitude", "calibration": tokens(4, 16)}
    with pytest.raises(InputError) as error:
        llmprune.prune(**run, output="-x 'y'", push_to_hub="acme/tiny")
    told = re.search("`(llmprune push .*)` pushes it later", str(error.value))
    assert told
    words = shlex.split(told[1])
    assert words[-1] == "acme/tiny"
    assert main([*words[1:-1], "me/tiny"]) == 0


def inside(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(inner)


@pytest.mark.parametrize("written", [str, inside], ids=["absolute", "relative"])
def test_no_local_path_is_pushed(
    written: Callable[[Path], str], source: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what ran from a folder, was evaluated beside one and on a file: dense and packed, read back, verified and shown."""
    monkeypatch.chdir(tmp_path.parent)
    text, out = written(tmp_path / "text.txt"), tmp_path / "out"
    run = ["--model", written(source), "--sparsity", "2:4", "--method", "magnitude", "--samples", "4", "--seqlen", "64"]
    assert main([*run, "--calibration", text, "--eval-text", text, "--output", written(out)]) == 0
    add(hub, "acme/tiny", source)
    for baseline in (written(source), "acme/tiny"):
        assert main(["eval", str(out), "--baseline", baseline, "--texts", text, "--seqlen", "64", "--windows", "2"]) == 0
    before = (out / "llmprune.json").read_bytes()
    local = json.loads(before)
    assert (local["arguments"]["model"], local["calibration"]["text"]) == (written(source), text)
    for name, folder in {"me/tiny": out, "me/packed": llmprune.pack(out, tmp_path / "packed").output}.items():
        llmprune.push(folder, name)
        for data in pushed(hub, name).values():
            assert tmp_path.name.encode() not in data
        record = json.loads(pushed(hub, name)["llmprune.json"])
        asked = {option: record["arguments"][option] for option in ("model", "output", "calibration", "eval_text")}
        assert asked == {"model": "source", "output": "out", "calibration": "text.txt", "eval_text": "text.txt"}
        assert [one["baseline"] for one in record["evaluations"]] == ["source", "acme/tiny"]
        assert record["evaluations"][0]["scores"][0]["name"] == "token perplexity of text.txt"
        changed = [(a, b) for a, b in zip(strings(local), strings(record), strict=True) if a != b]
        assert {Path(a).name for a, _ in changed} == {"source", "out", "text.txt"}
        there = tmp_path / "there" / name
        snapshot_download(name, local_dir=there)
        assert main(["verify", str(there)]) == 0
        assert main(["report", str(there), "-o", str(there.with_suffix(".html"))]) == 0
        page = json.loads(there.with_suffix(".json").read_text())["runs"][0]
        assert page["command"].startswith("llmprune --model source --sparsity 2:4 ")
    assert (out / "llmprune.json").read_bytes() == before


def test_a_push_keeps_what_is_no_local_path(hub: Hub, source: Path) -> None:
    """Names of ours and of the Hub."""
    add(hub, "acme/tiny", source)
    out = source.parent / "out"
    llmprune.prune("acme/tiny@main", sparsity="2:4", method="magnitude", calibration=tokens(4, 16), output=out)
    record = json.loads((out / "llmprune.json").read_text())
    record["arguments"] |= {"calibration": "allenai/c4", "eval_text": "wikitext2", "push_to_hub": "me/tiny", "output": "auto"}
    record["model"]["license"] = {"license_link": "https://example.com/LICENSE.txt"}
    (out / "llmprune.json").write_text(json.dumps(record))
    llmprune.push(out, "me/tiny")
    assert json.loads(pushed(hub, "me/tiny")["llmprune.json"]) == record


def damage(name: str) -> Callable[[Path], object]:
    """Another byte in a file."""

    def write(folder: Path) -> None:
        (path,) = folder.glob(name)
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    return write


def drop_shape(folder: Path) -> None:
    """A record that vouches for a configuration that the tensors do not fit."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    record = folder / "llmprune.json"
    found = llmprune.verify(folder)
    record.write_text(record.read_text().replace(found.sums["config.json"], sha256(config)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "llmprune.json").unlink(), "holds no llmprune.json: give a folder that llmprune wrote"),
        (damage("model-00002*"), "does not pass `llmprune verify`, so it is not pushed: model-00002-of-00004.safetensors"),
        (lambda folder: (folder / "notes.txt").touch(), "notes.txt: not in the record"),
        (lambda folder: (folder / "README.md").unlink(), "README.md: missing"),
        (drop_shape, "config.json and the weights do not belong together"),
    ],
    ids=["no record", "a byte", "a file more", "a file less", "configuration"],
)
def test_a_folder_that_is_not_whole_is_refused(spoil, words: str, folder: Path, hub: Hub, capsys) -> None:
    spoil(folder)
    assert main(["push", str(folder), "me/tiny"]) == 2
    assert words in one_line(capsys)
    assert hub.repositories == {}


def test_a_damaged_packed_folder_is_refused(packed: Path, hub: Hub) -> None:
    damage("packed-00002*")(packed)
    with pytest.raises(InputError, match="does not pass `llmprune verify`"):
        llmprune.push(packed, "me/tiny")
    assert hub.repositories == {}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    errors = capsys.readouterr().err
    assert errors.startswith("llmprune: error: ")
    assert errors.count("\n") == 1
    return errors


WHOAMI, CREATE, CARD = "GET /api/whoami-v2", "POST /api/repos/create", "POST /api/validate-yaml"
PREUPLOAD, BATCH, PUT, COMMIT = "POST .*/preupload/", "POST .*/objects/batch", "PUT /objects/", "POST .*/commit/"
STEPS = [WHOAMI, CREATE, PREUPLOAD, BATCH, PUT, COMMIT]


@pytest.mark.parametrize("step", [*STEPS, CARD, r"GET /api/models/me/tiny"])
@pytest.mark.parametrize("status", [500, 503])
def test_what_passes_is_tried_again(status: int, step: str, folder: Path, hub: Hub) -> None:
    hub.faults[step] = [status, status]
    llmprune.push(folder, "me/tiny")
    assert pushed(hub, "me/tiny") == contents(folder)


LASTING = [
    (500, 3, "its own fault: wait and push again"),
    (503, 3, "its own fault: wait and push again"),
    (429, 3, "too many requests: wait some minutes and push again"),
    (507, 3, "no storage is left there: free some and push again"),
    (401, 2, "the token is invalid or has expired: run `hf auth login`"),
    (403, 2, "the token may not write there: name a repository of your own"),
    (409, 2, "somebody else is changing it: push again"),
]
CASES = [(step, *case) for step in STEPS for case in LASTING if (step, case[0]) != (CREATE, 409)]  # that says: it is there


@pytest.mark.parametrize(("step", "status", "code", "words"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_what_lasts_is_one_line(step: str, status: int, code: int, words: str, folder: Path, hub: Hub, capsys) -> None:
    hub.faults[step] = [status] * 100
    assert main(["push", str(folder), "me/tiny"]) == code
    said = "" if step == WHOAMI and status in (401, 429) else " (out of order)"  # the client leaves it out
    assert f"cannot push to me/tiny: the Hub answered {status}{said}; {words}" in one_line(capsys)
    assert "me/tiny" not in hub.repositories or pushed(hub, "me/tiny") == {}
    hub.faults.clear()
    assert main(["push", str(folder), "me/tiny"]) == 0
    assert pushed(hub, "me/tiny") == contents(folder)


def test_an_answer_that_is_none(folder: Path, hub: Hub) -> None:
    hub.faults[CARD] = ["<html>busy</html>"] * 100
    with pytest.raises(MachineError, match="check the network and push again"):
        llmprune.push(folder, "me/tiny")


@pytest.mark.parametrize("step", [PREUPLOAD, PUT, COMMIT])
def test_a_token_that_expires(step: str, folder: Path, hub: Hub, capsys) -> None:
    hub.faults[step] = [hub.tokens.clear]
    assert main(["push", str(folder), "me/tiny"]) == 2
    assert "the token is invalid or has expired" in one_line(capsys)
    assert pushed(hub, "me/tiny") == {}


@pytest.mark.parametrize(("step", "name"), [(PREUPLOAD, "model-00002*"), (BATCH, "model-00001*"), (PUT, "config.json")])
def test_a_file_that_changes_meanwhile(step: str, name: str, folder: Path, hub: Hub, capsys) -> None:
    hub.faults[step] = [lambda: damage(name)(folder)]
    assert main(["push", str(folder), "me/tiny"]) == 2
    assert "changed during the upload, so nothing was committed" in one_line(capsys)
    assert pushed(hub, "me/tiny") == {}


def test_a_file_that_is_cut_short_meanwhile(folder: Path, hub: Hub, capsys) -> None:
    path = folder / "model-00001-of-00004.safetensors"
    hub.faults[BATCH] = [lambda: path.write_bytes(b"")]
    assert main(["push", str(folder), "me/tiny"]) == 2
    assert "model-00001-of-00004.safetensors changed during the upload" in one_line(capsys)


def test_somebody_else_s_commit_meanwhile(folder: Path, hub: Hub, capsys) -> None:
    hub.faults[PUT] = [lambda: hub.repositories["me/tiny"].commit({"theirs": b""})]
    assert main(["push", str(folder), "me/tiny"]) == 2
    assert "it was changed meanwhile: look at it and push again" in one_line(capsys)
    assert hub.files("me/tiny") == {"theirs": b""}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["acme/tiny"], "403 (You don't have the rights to write to acme/tiny); the token may not write there"),
        (["tiny"], "'tiny' is no repository id: give user/name"),
        (["me/a b"], "'me/a b' is no repository id: Repo id must use alphanumeric chars"),
        (["a/b/c"], "'a/b/c' is no repository id"),
        (["me/tiny", "--create-pr", "--revision", "x"], "leave out revision or create_pr"),
        (["me/public", "--private"], "me/public is there already, and public"),
    ],
    ids=["somebody else's", "no user", "characters", "slashes", "both", "public"],
)
def test_a_name_that_will_not_do(arguments: list[str], words: str, folder: Path, hub: Hub, capsys) -> None:
    hub.repositories["me/public"] = Repository()
    hub.repositories["me/public"].commit({})
    assert main(["push", str(folder), *arguments]) == 2
    assert words in one_line(capsys)
    assert not hub.asked("/commit/")


def test_no_network(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(folder), "me/tiny"]) == 3
    assert "cannot push to me/tiny at http://127.0.0.1:9 ([Errno 111] Connection refused)" in one_line(capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(folder), "me/tiny"]) == 2
    assert "HF_HUB_OFFLINE is set; unset it" in one_line(capsys)


def test_a_revision_is_pinned_and_kept(dense: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = add(hub, "acme/tiny", dense)
    second = add(hub, "acme/tiny", BUNDLED["llama"])
    add(hub, "acme/tiny", dense, branch="old/one")
    found = resolve(f"acme/tiny@{first}")
    assert (found.name, found.hub_id, found.commit) == ("tiny", "acme/tiny", first)
    assert (found.path / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    assert resolve("acme/tiny").commit == second
    assert (resolve("acme/tiny@old/one").path / "llmprune.json").is_file()
    with pytest.raises(InputError, match="acme/tiny on the Hub has no branch, tag or commit 'none'"):
        resolve("acme/tiny@none")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(f"acme/tiny@{first}").path == found.path
    assert resolve("acme/tiny").commit == second
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set.* the cache holds nothing of it; go online or pass a local"):
        resolve("acme/other")
    (resolve("acme/tiny").path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="the cache holds only part of it"):
        resolve("acme/tiny")


def test_a_hub_that_is_down_is_read_from_the_cache(dense: Path, hub: Hub) -> None:
    commit = add(hub, "acme/tiny", dense)
    resolve("acme/tiny")
    hub.faults["."] = [500] * 100
    assert resolve("acme/tiny").commit == commit
    with pytest.raises(MachineError, match=r"cannot fetch acme/other .*500.* the cache holds nothing of it"):
        resolve("acme/other")


def test_gated_and_private_models_are_explained(dense: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    add(hub, "acme/gated", dense)
    add(hub, "acme/own", dense)
    hub.repositories["acme/gated"].gated = hub.repositories["acme/own"].private = True
    hub.tokens.clear()
    with pytest.raises(InputError, match=r"acme/gated is gated: accept its licence at http://\S+/acme/gated, then run"):
        resolve("acme/gated")
    with pytest.raises(InputError, match=r"no model acme/own on the Hub .a private one needs `hf auth login`"):
        resolve("acme/own")
