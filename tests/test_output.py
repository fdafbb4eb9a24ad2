"""The folder a run leaves: loads anywhere, says what it is, and notices when it was touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.files import sha256
from llmprune.base.folders import locked, published
from llmprune.cli.main import main
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.resolve import BUNDLED
from llmprune.numerics.patterns import NM, verify


def prune(folder: Path, output: Path, **changes: object) -> llmprune.Result:
    return llmprune.prune(folder, output=output, **({"sparsity": "2:4", "calibration": tokens(4, 16)} | changes))


def test_loads_in_a_fresh_process_with_plain_transformers(family: str, saved, tmp_path: Path, read_elsewhere) -> None:
    source = tiny_model(family)
    prune(saved(source), tmp_path / "out")
    found = read_elsewhere(tmp_path / "out")
    assert found["amiss"] == {}
    logits = torch.tensor(found["logits"])
    assert torch.isfinite(logits).all()
    with torch.no_grad():
        assert not torch.allclose(logits, source(torch.tensor([[5, 6, 7, 8]])).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_names_dtypes_and_untouched_tensors_are_the_source_s(dtype: torch.dtype, family: str, saved, tmp_path: Path) -> None:
    folder = saved(tiny_model(family).to(dtype))
    record = prune(folder, tmp_path / "out").record
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert {n: (i.shape, i.dtype) for n, i in before.tensors.items()} == {
        n: (i.shape, i.dtype) for n, i in after.tensors.items()
    }
    pruned = {site.tensor: site for site in record.sites}
    old = dict(before.read(list(before.tensors)))
    for name, tensor in after.read(list(after.tensors)):
        if name in pruned:
            verify(tensor.T if pruned[name].transposed else tensor, NM(2, 4))
        else:
            assert torch.equal(tensor, old[name]), name


def test_one_shard_a_block_readable_by_all(saved, tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        prune(saved(tiny_model("llama")), tmp_path / "out")
    finally:
        os.umask(previous)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    for index, shard in enumerate(shards[:3]):
        with safe_open(shard, framework="pt") as handle:
            assert {name.split(".")[2] for name in handle.keys()} == {str(index)}  # noqa: SIM118
            assert handle.metadata() == {"format": "pt"}
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o644"}


def test_record_says_what_was_done(saved, tmp_path: Path) -> None:
    folder = saved(tiny_model("gpt2"))
    result = prune(folder, tmp_path / "out", skip=("*.c_attn",), seed=3)
    record = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert record["arguments"]["sparsity"] == "2:4"
    assert record["arguments"]["seed"] == 3
    assert record["calibration"] == {"text": "given tokens", "samples": 4, "seqlen": 16, "tokens": 64, "seed": 3}
    assert set(record["versions"]) >= {"python", "torch", "transformers"}
    assert {site["name"].rsplit(".", 1)[-1] for site in record["sites"]} == {"c_proj", "c_fc"}
    assert record["skipped"] == {f"transformer.h.{i}.attn.c_attn": "in --skip" for i in range(3)}
    for site in record["sites"]:
        assert site["sparsity"] == 0.5
        assert 0 < site["error"] < 1
        assert site["transposed"] is True
        assert site["notes"]["residual"] < 0.1
        assert site["tokens"] == 64
    model = result.model or type(tiny_model("gpt2")).from_pretrained(tmp_path / "out")
    assert record["size"]["nonzero_before"] - record["size"]["nonzero_after"] == result.record.zeros()
    assert record["size"]["nonzero_before"] == result.record.weights()
    assert sum(int((p == 0).sum()) for p in model.parameters()) >= result.record.zeros()
    assert record["size"]["bytes_before"] == record["size"]["bytes_after"]


def test_card_tells_how_to_load(saved, tmp_path: Path) -> None:
    prune(saved(tiny_model("llama")), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for words in (
        "**2:4**",
        "`balanced: annealed + refit + corrected target`",
        "4 windows of 16 tokens",
        "from_pretrained",
        "llmprune verify",
    ):
        assert words in card, words
    assert "perplexity" not in card


def edit(folder: Path, change) -> str:
    """Apply `change` to the first shard's tensors; returns the shard's name."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return shard.name


Q = "model.layers.0.self_attn.q_proj.weight"


def test_verify_notices_what_was_touched(saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(saved(tiny_model("llama")), out)
    assert llmprune.verify(out).problems == ()
    shard = edit(out, lambda tensors: tensors[Q].fill_(1.0))
    assert llmprune.verify(out).problems == (
        f"{shard}: sha256 differs from the record",
        f"{Q}: not 2:4: row 0, columns 0 to 3: 4 nonzeros, 2 allowed",
    )


def test_verify_notices_flipped_bits_missing_and_added_files(saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(saved(tiny_model("llama")), out)
    config = out / "config.json"
    config.write_bytes(config.read_bytes().replace(b"32", b"33", 1))
    (out / "generation_config.json").unlink()
    save_file({"x": torch.zeros(1)}, out / "extra.safetensors")
    assert llmprune.verify(out).problems == (
        "config.json: sha256 differs from the record",
        "generation_config.json: missing",
        "extra.safetensors: not in the record",
    )


@pytest.fixture
def templates(saved) -> Path:
    """A tiny Llama whose tokenizer has two chat templates, one of them in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    path = saved(tiny_model("llama", vocab_size=len(tokenizer)))
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(path)
    return path


TEMPLATES = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
INSIDE = "additional_chat_templates/tool_use.jinja"


@pytest.mark.parametrize("road", ["folder", "structure", "both", "memory", "resumed"])
def test_every_chat_template_comes_along(road: str, templates: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if road == "memory":
        model, tokenizer = AutoModelForCausalLM.from_pretrained(templates), AutoTokenizer.from_pretrained(templates)
        llmprune.prune(model, tokenizer=tokenizer, sparsity="2:4", calibration=tokens(4, 16), output=out)
    elif road in ("structure", "both"):
        prune(templates, out, neurons="25%", round_to=4, sparsity="2:4" if road == "both" else None)
    else:
        if road == "resumed":
            (tmp_path / ".out.partial" / "additional_chat_templates").mkdir(parents=True)
            (tmp_path / ".out.partial" / "additional_chat_templates" / "old.jinja").write_text("of another model")
        prune(templates, out)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATES
    assert INSIDE in llmprune.verify(out).sums
    assert llmprune.verify(out).problems == ()
    if road != "structure":
        llmprune.pack(out, tmp_path / "packed")
        assert INSIDE in llmprune.verify(tmp_path / "packed").sums
        assert llmprune.verify(tmp_path / "packed").problems == ()
        llmprune.unpack(tmp_path / "packed", tmp_path / "back")
        assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATES
        assert llmprune.verify(tmp_path / "back").problems == ()


def test_verify_looks_into_folders(templates: Path, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        prune(templates, tmp_path / "out")
    finally:
        os.umask(previous)
    folder = tmp_path / "out" / "additional_chat_templates"
    assert (folder.stat().st_mode & 0o777, (folder / "tool_use.jinja").stat().st_mode & 0o777) == (0o750, 0o640)
    (folder / "tool_use.jinja").write_text("other")
    (folder / "more.jinja").touch()
    (tmp_path / "out" / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "out" / ".git").mkdir()
    (tmp_path / "out" / ".git" / "config").touch()
    assert llmprune.verify(tmp_path / "out").problems == (
        f"{INSIDE}: sha256 differs from the record",
        "additional_chat_templates/more.jinja: not in the record",
        "notes: not in the record",
    )


def test_verify_does_not_leave_the_folder(saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(saved(tiny_model("llama")), out)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x").write_text("secret")
    (out / "link").symlink_to(tmp_path / "secret")
    digest, record = sha256(tmp_path / "secret" / "x"), json.loads((out / "llmprune.json").read_text())
    names = ["../secret/x", str(tmp_path / "secret" / "x"), "link/x", "a\0b/c", "."]
    record["files"] |= dict.fromkeys(names, digest)
    (out / "llmprune.json").write_text(json.dumps(record))
    problems = llmprune.verify(out).problems
    assert problems[: len(names)] == tuple(f"{name}: missing" for name in names)


def test_verify_reports_a_broken_shard_with_the_rest(saved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(saved(tiny_model("llama")), out)
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    problems = llmprune.verify(out).problems
    assert problems[0] == f"{shard.name}: sha256 differs from the record"
    assert "truncated or corrupt" in problems[1]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that Linux does not read")
def test_verify_checks_what_is_whole_beside_what_is_broken(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    prune(saved(tiny_model("llama")), out)
    first, second, third, *_ = sorted(out.glob("*.safetensors"))
    edit(out, lambda tensors: tensors[Q].fill_(1.0))
    for shard in (second, third):
        shard.write_bytes(shard.read_bytes()[:-10])
    (out / "model.safetensors.index.json").write_text("{")
    (out / "generation_config.json").unlink()
    (out / "generation_config.json").symlink_to("/proc/self/mem")  # reading it fails
    assert main(["verify", str(out)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].removeprefix("FAILED  ") for line in lines[:5]] == sorted(
        ["generation_config.json", first.name, second.name, third.name, "model.safetensors.index.json"]
    )
    assert sum("cannot be read: Input/output error" in line for line in lines) == 1
    assert [sum(words in line for line in lines) for words in ("index.json is not JSON", "truncated or corrupt")] == [1, 2]
    assert f"FAILED  {Q}: not 2:4: row 0, columns 0 to 3: 4 nonzeros, 2 allowed" in lines
    assert len(lines) == 9
    assert last.endswith("9 problems")


@pytest.mark.parametrize(("name", "words"), [
    ("nosuch", "folder nosuch does not exist"),
    ("file", "folder file is a file: give the folder"),
    (".", "holds no llmprune.json: give a folder that llmprune wrote"),
])  # fmt: skip
def test_verify_says_what_is_not_there(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["verify", name]) == 2
    assert words in capsys.readouterr().err


SITE = {"tensor": Q, "pattern": "2:4", "part": "", "transposed": False}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "schema None"),
        ('{"schema": 99}', "schema 99; this llmprune reads 1"),
        ('{"schema": 1}', "no record of a run"),
        ('{"schema": 1, "files": [], "sites": []}', "no record of a run"),
        ('{"schema": 1, "files": {}, "sites": [1]}', "no record of a run"),
        (json.dumps({"schema": 1, "files": {}, "sites": [SITE | {"pattern": "4:2"}]}), "4:2"),
        (json.dumps({"schema": 1, "files": {}, "sites": [SITE | {"pattern": None}]}), "no record of a run"),
        (json.dumps({"schema": 1, "files": {}, "sites": [SITE | {"part": "1:x"}]}), "no record of a run"),
        ("[" * 100000, "is not JSON"),
    ],
    ids=range(9),
)
def test_verify_refuses_what_is_no_record(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "llmprune.json").write_text(content)
    with pytest.raises(InputError, match=words):
        llmprune.verify(tmp_path)


def test_a_folder_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run() -> None:
        with published(out, overwrite=False) as partial:
            (partial / "new").write_text("new")
            out.mkdir()
            (out / "theirs").write_text("theirs")

    with pytest.raises(InputError, match="was filled meanwhile"):
        run()
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_signal_between_the_renames_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if len(calls) == 2:
            raise SystemExit(143)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit), published(out, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


_KILLED = """
import os, sys
from pathlib import Path
from llmprune.base.folders import published
rename, calls = Path.rename, []

def kill(self, target):
    calls.append(self)
    if len(calls) == 2:
        os._exit(9)
    return rename(self, target)

Path.rename = kill
with published(Path(sys.argv[1]), overwrite=True) as partial:
    (partial / "new").write_text("new")
"""


def test_a_kill_between_the_renames_costs_no_model(saved, python: list[str], tmp_path: Path) -> None:
    """The next run gives the old model its name back, and replaces it only where that is asked for."""
    source, out = saved(tiny_model("llama")), tmp_path / "out"
    prune(source, out)
    old = {path.name: path.read_bytes() for path in out.iterdir()}
    assert subprocess.run([*python, "-c", _KILLED, str(out)], check=False).returncode == 9
    assert not out.exists()
    with pytest.raises(InputError, match="is not empty: choose another, or pass --overwrite"):
        prune(source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == old
    prune(source, out, overwrite=True, method="magnitude")
    assert llmprune.verify(out).problems == ()
    assert [path.name for path in tmp_path.glob(".out*") if not path.name.endswith(".partial")] == []


@pytest.mark.parametrize("act", ["prune", "pack", "unpack", "in memory"])
def test_what_an_earlier_run_replaced_and_left_goes(act: str, saved, tmp_path: Path) -> None:
    source, out, left = saved(tiny_model("llama")), tmp_path / "out", tmp_path / ".out.replaced"
    prune(source, out)
    shutil.copytree(out, left)
    if act == "prune":
        prune(source, out, overwrite=True)
    elif act == "in memory":
        llmprune.prune(tiny_model("llama"), sparsity="2:4", calibration=tokens(4, 16), output=out, overwrite=True)
    else:
        shutil.copytree(out, tmp_path / "dense")
        llmprune.pack(tmp_path / "dense", tmp_path / "packed")
        convert, folder = (llmprune.pack, "dense") if act == "pack" else (llmprune.unpack, "packed")
        convert(tmp_path / folder, out, overwrite=True)
    assert llmprune.verify(out).problems == ()
    assert not left.exists()


def test_a_replacement_that_is_under_way_is_left_alone(saved, tmp_path: Path) -> None:
    source, out = saved(tiny_model("llama")), tmp_path / "out"
    prune(source, out)
    with locked(out, out):
        out.rename(tmp_path / ".out.replaced")
        with pytest.raises(InputError, match="another run is writing"):
            prune(source, out)
        (tmp_path / ".out.replaced").rename(out)
    assert llmprune.verify(out).problems == ()


def test_what_cannot_be_removed_is_an_error_before_the_work(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, left = saved(tiny_model("llama")), tmp_path / "out", tmp_path / ".out.replaced"
    prune(source, out)
    left.mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(InputError, match=r"cannot remove .*\.out\.replaced.*: Permission denied"):
        prune(source, out, overwrite=True)


def test_a_model_in_memory_can_be_saved_too(saved, tmp_path: Path) -> None:
    model = tiny_model("qwen3").train()
    result = llmprune.prune(model, sparsity="0.5", method="wanda", calibration=tokens(4, 16), output=tmp_path / "out")
    assert result.model is model
    assert model.training
    assert llmprune.verify(tmp_path / "out").problems == ()
    again = type(model).from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_python_mistakes_are_one_line(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for options, words in (
        ({"sparcity": "2:4"}, "did you mean sparsity"),
        ({"sparsity": "2:4", "samples": "8"}, "samples must be a whole number"),
        ({"sparsity": "2:4", "calibration": "pydoc"}, "needs a tokenizer"),
        ({"sparsity": "2:4", "calibration": tokens(2, 8) + 500}, "outside the model's vocabulary of 96"),
        ({"sparsity": "2:4", "calibration": tokens(2, 8) - 100}, "outside the model's vocabulary"),
        ({"sparsity": "2:4", "calibration": tokens(2, 65)}, "exceed the model's 64 positions"),
        ({"calibration": tokens(2, 8)}, "sparsity is required"),
        ({"sparsity": "2:4", "calibration": tokens(2, 8), "device": "cuda:9"}, "leave device and dtype out"),
        ({"sparsity": "2:4", "calibration": tokens(2, 8), "tokenizer": "gpt2"}, "tokenizer must be"),
    ):
        with pytest.raises(InputError, match=words):
            llmprune.prune(model, **options)
    for wrong in (None, torch.nn.Linear(2, 2), b"llama"):
        with pytest.raises(InputError, match="model must be a transformers model, a folder or a name"):
            llmprune.prune(wrong, sparsity="2:4")  # type: ignore[arg-type]


def test_an_already_sparse_model_is_counted_as_it_is(saved, tmp_path: Path) -> None:
    prune(saved(tiny_model("llama")), tmp_path / "half")
    size = prune(tmp_path / "half", tmp_path / "quarter", sparsity="1:4").record.size
    assert size["nonzero_after"] * 2 == size["nonzero_before"]
