"""The command as a user types it: what it prints, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub import serve

import llmprune
from llmprune.base.folders import locked
from llmprune.cli.main import main

QUICK = ["--samples", "4", "--seqlen", "64", "--eval-text", "none"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(str(n) for n in range(3000)))
    return path


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from llmprune.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--sparsity" in printed
    for words in ("magnitude", "sparsegpt", "wanda", "llmprune verify", "llmprune bench"):
        assert words in printed
    for heavy in ("'torch'", "'transformers'", "'datasets'", "'rich'"):
        assert heavy not in printed


def test_a_run_shows_what_it_did(folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--model", str(folder), "--sparsity", "2:4", "--calibration", str(text), *QUICK, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "LlamaForCausalLM",
        "2:4 in 21 matrices",
        "balanced: annealed + refit + corrected target",
        "4 windows x 64 tokens",
        "block 3/3",
        "50.00%",
        str(out),
    ):
        assert words in printed, words
    assert f"wrote {out}" in printed
    assert "perplexity" not in printed
    assert "bundled" not in printed
    assert main(["verify", str(out)]) == 0
    assert "21 matrices checked, 0 problems" in capsys.readouterr().out


def commands(printed: str) -> list[list[str]]:
    """The words of the commands that were printed to go on with, as a shell reads them."""
    return [shlex.split(line) for line in printed.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("name", ["-x", "a 'b' \"c\" $HOME \U0001f600"])
def test_what_is_printed_can_be_pasted(
    name: str, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Next steps, and the model card's command, whatever the model and the output are called."""
    monkeypatch.chdir(tmp_path)
    folder.rename("-m")
    run = ["--model=-m", "--sparsity", "2:4", "--method", "magnitude", "--calibration", text.name, *QUICK]
    assert main([*run, f"--output={name}"]) == 0
    verify, load, evaluate = commands(capsys.readouterr().out)
    assert evaluate[:2] == ["llmprune", "eval"]
    assert main([*evaluate[1:], "--windows", "1"]) == 0
    assert verify[:2] == ["llmprune", "verify"]
    assert main(verify[1:]) == 0
    assert load[:2] == ["python", "-c"]
    exec(load[2], {})
    card = Path(name, "README.md").read_text()
    code, command = card.split("```python\n")[1].split("```")[0], card.split("```bash\n")[1].split("```")[0]
    exec(code, {})
    assert main([*shlex.split(command)[1:], "--output", "again"]) == 0
    assert {path.name: path.read_bytes() for path in Path(name).glob("*.safetensors")} == {
        path.name: path.read_bytes() for path in Path("again").glob("*.safetensors")
    }
    capsys.readouterr()
    assert main(["pack", "again", f"./{name}p"]) == 0
    bench, load = commands(capsys.readouterr().out)
    assert bench[:2] == ["llmprune", "bench"]
    assert main(["verify", *bench[2:]]) == 0
    exec(load[2], {})


def test_config_file_and_flags_share_names(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f'model: {folder}\nsparsity: "1:4"\nmethod: wanda\ncalibration: {text}\nsamples: 4\nseqlen: 32\n'
        f"eval-text: none\ntrue_sequential: false\nskip: ['*.o_proj']\noutput: {tmp_path / 'out'}\n"
    )
    assert main(["--config", str(config), "--method", "magnitude"]) == 0
    printed = capsys.readouterr().out
    for words in ("1:4 in 18 matrices, 3 left out", "magnitude, one pass a block", "4 windows x 32 tokens"):
        assert words in printed, words
    assert main(["--config", str(config), "--quality", "fast", "--overwrite"]) == 0
    assert "fast: annealed + refit, one pass a block" in capsys.readouterr().out


def test_repeated_globs_add_up(folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--model", str(folder), "--sparsity", "2:4", "--calibration", str(text), *QUICK, "--output", str(tmp_path / "out")]
    assert main([*run, "--skip", "*.o_proj", "--skip", "*.down_proj"]) == 0
    assert "2:4 in 15 matrices, 6 left out" in capsys.readouterr().out


MODEL = ["--model", "llama"]
EARLY = {  # said before torch is imported
    **{f"empty {name}": ([*MODEL, "--sparsity", "2:4", f"--{name}", ""], f"{name} is empty") for name in ("method", "output")},
    "empty sparsity": ([*MODEL, "--sparsity", " "], "sparsity is empty: give 0.5, 50% or N:M such as 2:4"),
    "empty heads": ([*MODEL, "--heads", ""], "heads '' is impossible: give a share to remove such as 25%"),
    "empty model": (["--model", "", "--sparsity", "2:4"], "model is empty"),
    "amount": ([*MODEL, "--neurons", "25 percent"], "neurons '25 percent' is impossible"),
    "budget": ([*MODEL, "--target-params", "most"], "target_params 'most' is impossible"),
    "speed": ([*MODEL, "--target-speedup", "0.5x"], "target_speedup '0.5x' is impossible: give a factor above 1"),
    "speed of nothing": ([*MODEL, "--sparsity", "2:4", "--for", "prefill"], "for has no effect here: it is there to say what"),
    "speed of what": ([*MODEL, "--target-speedup", "2x", "--for", "prefil"], "did you mean prefill"),
    "bytes": ([*MODEL, "--target-bytes", "5B"], "target_bytes '5B' is impossible: give a share to keep such as 75%"),
    "pattern": ([*MODEL, "--sparsity", "4:2"], "N:M keeps N of every M weights"),
    "method": ([*MODEL, "--sparsity", "2:4", "--method", "wnada"], "did you mean wanda"),
    "quality": ([*MODEL, "--sparsity", "2:4", "--quality", "bets"], "did you mean best"),
    "target": ([*MODEL, "--sparsity", "2:4", "--target", "densse"], "did you mean dense"),
    "score": ([*MODEL, "--heads", "25%", "--score", "second_ordr"], "did you mean second_order"),
    "dtype": ([*MODEL, "--sparsity", "2:4", "--dtype", "floot16"], "did you mean float16"),
    "config": (["--config", "none.yaml"], "cannot read config none.yaml"),
    "model": (["--model", "lama", "--sparsity", "2:4"], "did you mean llama"),
    "no such folder": (["--model", "./no/such", "--sparsity", "2:4"], "does not exist"),
    "no hub id": (["--model", "owner/a b", "--sparsity", "2:4"], "is neither a folder nor a Hub id"),
    "output is a file": ([*MODEL, "--sparsity", "2:4", "--output", "file"], "output file is a file: choose a folder"),
    "output under a file": ([*MODEL, "--sparsity", "2:4", "--output", "file/out"], "is a file"),
    "output is full": ([*MODEL, "--sparsity", "2:4", "--output", "full"], "output full is not empty"),
    "output of another name": ([*MODEL, "--sparsity", "2:4", "--method", "wanda"], "output llama-2of4-wanda is not empty"),
    "overwriting another's": ([*MODEL, "--sparsity", "2:4", "--output", "full", "--overwrite"], "llmprune did not write it"),
    "output holds the work": ([*MODEL, "--sparsity", "2:4", "--output", "."], "name a new folder inside it"),
    "no effect": ([*MODEL, "--heads", "25%", "--no-true-sequential"], "true_sequential has no effect here"),
}


def test_what_needs_no_torch_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("full", "llama-2of4-wanda"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("")
    code = (
        "import json, sys; from llmprune.cli.main import main\n"
        "for case in json.load(sys.stdin): assert main(case) == 2, case\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    cases = json.dumps([arguments for arguments, _ in EARLY.values()])
    done = subprocess.run([sys.executable, "-c", code], input=cases, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr
    errors = done.stderr.splitlines()
    for (case, (_, words)), error in zip(EARLY.items(), errors, strict=True):
        assert error.startswith("llmprune: error: "), case
        assert words in error, case
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "llama-2of4-wanda"]


_STOP = """
import sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit(7)
sys.meta_path.insert(0, Stop())
from llmprune.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("flags", "rank", "out", "err"), [
    ([], "0", "llmprune {version}: loading torch and transformers ...\n", ""),
    (["--json", "-"], "0", "", "llmprune {version}: loading torch and transformers ...\n"),
    (["--quiet"], "0", "", ""),
    ([], "1", "", ""),
])  # fmt: skip
def test_the_first_line_comes_before_torch(flags: list[str], rank: str, out: str, err: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STOP, *MODEL, "--sparsity", "2:4", *flags]
    environment = {**os.environ, "RANK": rank}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 7
    assert (done.stdout, done.stderr) == tuple(text.format(version=llmprune.__version__) for text in (out, err))


BAD = {
    **{f"sparsity {s}": ([*MODEL, "--sparsity", s], "sparsity") for s in ("4:2", "0:4", "-1", "1.5", "nan", "abc", "50", "2:")},
    "columns": (
        [*MODEL, "--sparsity", "3:7", *QUICK],
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj: its width of 256 columns is not a multiple of 7; down_proj: its",
    ),
    "method": ([*MODEL, "--sparsity", "2:4", "--method", "wnada"], "did you mean wanda"),
    "quality": ([*MODEL, "--sparsity", "2:4", "--quality", "bets"], "did you mean best"),
    "target": ([*MODEL, "--sparsity", "2:4", "--target", "densse"], "did you mean dense"),
    "method and quality": ([*MODEL, "--sparsity", "2:4", "--method", "wanda", "--quality", "best"], "exclude each other"),
    "model": (["--model", "lama", "--sparsity", "2:4"], "did you mean llama"),
    "no such folder": (["--model", "./no/such", "--sparsity", "2:4"], "does not exist"),
    "hub id, no network": (["--model", "owner/name", "--sparsity", "2:4"], "go online or pass a local folder"),
    "flag": ([*MODEL, "--sparsty", "2:4"], "did you mean --sparsity"),
    "flag with value": ([*MODEL, "--sparsity", "2:4", "--seqlne=3"], "did you mean --seqlen"),
    "command": (["verfy", "x"], "unknown command 'verfy'; did you mean verify"),
    "command at the end": (["--model", "llama", "verify"], "'verify' is a command, which comes first: llmprune verify"),
    "no model": (["--sparsity", "2:4"], "model is required: pass --model"),
    "no sparsity": (MODEL, "sparsity is required"),
    "samples": ([*MODEL, "--sparsity", "2:4", "--samples", "0"], "samples 0 is impossible"),
    "samples text": ([*MODEL, "--sparsity", "2:4", "--samples", "many"], "invalid int value: 'many'"),
    "too many samples": ([*MODEL, "--sparsity", "2:4", "--samples", "99999"], "windows of 512 tokens, fewer than the 99999"),
    "device": ([*MODEL, "--sparsity", "2:4", "--device", "tpu7"], "device 'tpu7' cannot be used here"),
    "dtype": ([*MODEL, "--sparsity", "2:4", "--dtype", "floot16"], "did you mean float16"),
    "skip": ([*MODEL, "--sparsity", "2:4", "--skip", "*.qproj", *QUICK[:4]], "'*.qproj' matches no site; sites are named like"),
    "skip all": ([*MODEL, "--sparsity", "2:4", "--skip", "*", *QUICK[:4]], "leave nothing to prune"),
    "calibration": ([*MODEL, "--sparsity", "2:4", "--calibration", "none.txt"], "none.txt does not exist"),
    "evaluation": ([*MODEL, "--sparsity", "2:4", "--eval-text", "wikitext"], "did you mean wikitext2"),
    "config": (["--config", "none.yaml"], "cannot read config none.yaml"),
    "nothing to drop": ([*MODEL, "--sparsity", "1e-9", *QUICK], "would drop none or all of its"),
    "empty output": ([*MODEL, "--sparsity", "2:4", "--output", ""], "output is empty"),
    "output in the current folder": ([*MODEL, "--sparsity", "2:4", "--output", "."], "name a new folder inside it"),
    "long output": ([*MODEL, "--sparsity", "2:4", "--output", "x" * 300], "is no usable path"),
    "no such home": ([*MODEL, "--sparsity", "2:4", "--output", "~nobody-of-this-name/x"], "is no usable path"),
    "empty model": (["--model", "", "--sparsity", "2:4"], "model is empty"),
    "long model": (["--model", "x" * 300, "--sparsity", "2:4"], "is no usable path"),
    "mps": ([*MODEL, "--sparsity", "2:4", "--device", "mps"], "device 'mps' has no float64"),
    "meta device": ([*MODEL, "--sparsity", "2:4", "--device", "meta"], "holds no data"),
    "verify": (["verify", "."], "holds no llmprune.json"),
    "verify nothing": (["verify"], "required: DIR"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_writes_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD[case]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("llmprune: error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sparsity: 2:4", 'run.yaml: YAML reads an unquoted N:M as the number 124: quote it, sparsity: "2:4"'),
        ("sparsity: '2:4'\nmetod: wanda", "run.yaml: unknown option 'metod'; did you mean method"),
        ("samples: '8'", "run.yaml: samples must be a whole number, not '8'"),
        ("true_sequential: 1", "run.yaml: true_sequential must be true or false, not 1"),
        ("skip: [1]", "skip must be a list of text"),
        ("- a", "must be a mapping"),
        ("a: [", "is not YAML"),
        ("sparsity: true", "sparsity must be 0.5, 50% or N:M"),
        ("method: wanda\nmethod: magnitude", "'method' is given twice"),
        ("batch-size: 1\nbatch_size: 2", "gives an option twice"),
        ("method: 2024-13-45", "is not YAML"),
        ("samples: 0", "run.yaml: samples 0 is impossible"),
    ],
)
def test_bad_yaml(content: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert main(["--config", str(path), "--model", "llama"]) == 2
    assert words in capsys.readouterr().err


def test_outputs_that_would_cost_something(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for output, words in {
        tmp_path / "theirs": "llmprune did not write it",
        tmp_path / "file" / "out": "is a file",
        folder: "the model's own folder",
        folder.parent: "or holds it",
        folder / "inside": "inside the model's folder",
        tmp_path / "full": "is not empty",
        tmp_path / "file": "is a file",
    }.items():
        overwrite = ["--overwrite"] if output != tmp_path / "full" else []
        assert main(["--model", str(folder), "--sparsity", "2:4", "--output", str(output), *overwrite]) == 2
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces_the_folder_whole(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ["--model", str(folder), "--sparsity", "2:4", "--calibration", str(text), *QUICK, "--output", str(out)]
    assert main(run) == 0
    (out / "stale.safetensors").write_text("old")
    assert main(run) == 2
    assert main([*run, "--overwrite"]) == 0
    assert not (out / "stale.safetensors").exists()
    assert main(["verify", str(out)]) == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_finished_command_says_that_it_is(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = ["--model", str(folder), "--sparsity", "2:4", "--method", "wanda", "--calibration", str(text), *QUICK]
    run += ["--output", str(out)]
    assert main(run) == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    capsys.readouterr()
    for again in (run, [*run, "--restart", "--sparsity", " 02:04 "]):
        assert main(again) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(
            f"{out} is complete: an earlier run of this command wrote it; `llmprune verify {out}` checks it"
        )
        assert printed.count("\n") == 1
    assert main([*run, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == str(out)
    assert len(told["sites"]) == 21
    assert main([*run, "--seed", "1"]) == 2
    assert f"output {out} is not empty" in capsys.readouterr().err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    tokenizer = (out / "tokenizer.json").read_bytes()
    (out / "tokenizer.json").unlink()
    assert main(run) == 2
    (out / "tokenizer.json").write_bytes(tokenizer)
    (out / "llmprune.json").write_text("{")
    assert main(run) == 2


def test_a_failed_overwrite_keeps_the_old_folder(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("old")
    (out / "llmprune.json").write_text("{}")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    run = ["--model", str(folder), "--sparsity", "2:4", *QUICK, "--output", str(out), "--overwrite"]
    assert main([*run, "--calibration", str(empty)]) == 2
    assert (out / "precious").read_text() == "old"


RUN = ("--sparsity", "2:4", "--eval-text", "none", "--dtype", "float32", "--output", "out")


@contextmanager
def started(command: list[str], words: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed a line that begins with `words`."""
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith(words) for line in process.stdout)
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_before_the_first_block_leaves_nothing(number: signal.Signals, python: list[str], tmp_path: Path) -> None:
    with started([*python, "-m", "llmprune", *MODEL, *RUN], "compute", tmp_path) as process:
        process.send_signal(number)
        output, errors = process.communicate()
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert "Traceback" not in errors
    assert "block 1/" not in output
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_says_how_it_goes_on(
    python: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*MODEL, *RUN, "--quality", "fast", "--samples", "16", "--seqlen", "128"]
    with started([*python, "-m", "llmprune", *run], "block 2/", tmp_path) as process:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
    assert re.search(r"finished: \d blocks?; the same command goes on from there", output)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.chdir(tmp_path)
    with locked(tmp_path / ".out.partial", tmp_path / "out"):
        assert main(run) == 2
    assert "another run is writing " in capsys.readouterr().err
    assert main(run) == 0
    shown = capsys.readouterr().out
    assert "note: going on after block" in shown
    assert "block 1/4  finished by an earlier run" in shown
    assert "block 4/4  output error: q_proj" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("limit", "words"), [(20_000, "cannot copy"), (300_000, "cannot write the weights")])
def test_a_full_disk_is_one_line(
    limit: int, words: str, folder: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on file size stands in for a full disk: the tokenizer, or the embeddings, cannot be written."""
    run = ["--model", str(folder), "--sparsity", "2:4", "--calibration", str(text), *QUICK, "--output", str(tmp_path / "out")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code = main(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    errors = capfd.readouterr().err
    assert code == 3, errors
    assert words in errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    left = {".out.partial"} if "weights" in words else set()  # blocks are finished: with room again, it goes on
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"} | left
    assert main(run) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert not (tmp_path / ".out.partial").exists()


def test_a_hub_model_takes_the_same_road(folder: Path, text: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("theirs")
    with serve({"acme/tiny": folder}) as endpoint:
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # others add in another order
        }
        run = ["--sparsity", "2:4", "--calibration", str(text), *QUICK, "--output", str(tmp_path / "out")]
        commands = [["--model", "acme/tiny", *run], ["--model", "acme/absent", *run[:-1], str(tmp_path / "other")]]
        code = f"from llmprune.cli.main import main\nfor command in {commands!r}: print(main(command))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert [line for line in done.stdout.splitlines() if len(line) == 1] == ["0", "2"], done.stderr
    assert "no model acme/absent on the Hub" in done.stderr
    assert "base_model: acme/tiny" in (tmp_path / "out" / "README.md").read_text()
    assert main(["--model", str(folder), *run[:-1], str(tmp_path / "local")]) == 0
    for shard in sorted((tmp_path / "local").glob("*.safetensors")):
        assert shard.read_bytes() == (tmp_path / "out" / shard.name).read_bytes()
