"""What all commands share: JSON for scripts, silence, more words, completion, help at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tokens

import llmprune
from llmprune.cli.commands import COMMANDS, DEFAULT
from llmprune.cli.main import main
from llmprune.job.record import RunRecord

Printed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pruned(folder: Path, tmp_path: Path) -> Path:
    llmprune.prune(folder, sparsity="2:4", method="magnitude", calibration=tokens(4, 16), output=tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Printed:
    """A command's exit code, and what it prints on both streams."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(map(str, arguments)))
        return code, *capfd.readouterr()

    return run


def prune(folder: Path, out: Path) -> list[object]:
    text = out.with_suffix(".txt")
    text.write_text(" ".join(str(n) for n in range(3000)))
    return [
        *("--model", folder, "--sparsity", "2:4", "--method", "wanda", "--calibration", text, "--eval-text", "none"),
        *("--samples", 4, "--seqlen", 64, "--output", out),
    ]


def test_pruning_as_json(folder: Path, tmp_path: Path, run: Printed) -> None:
    code, out, err = run(*prune(folder, tmp_path / "out"), "--json", "-")
    assert code == 0
    record = json.loads(out)
    assert record["output"] == str(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert record["sites"] == written["sites"]
    assert "block 3/3" in err
    assert f"wrote {tmp_path / 'out'}" in err


def test_pruning_quietly_and_in_many_words(folder: Path, tmp_path: Path, run: Printed) -> None:
    assert run(*prune(folder, tmp_path / "quiet"), "-q", "--json", tmp_path / "run.json") == (0, "", "")
    assert len(json.loads((tmp_path / "run.json").read_text())["sites"]) == 21
    code, out, _ = run(*prune(folder, tmp_path / "verbose"), "--verbose")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("  model.layers.")]
    assert len(lines) == 21
    assert "model.layers.0.self_attn.q_proj  2:4  32 x 32  zeros 50.00%" in lines[0]
    code, out, err = run(*prune(folder, tmp_path / "quiet"), "-q", "--seed", 1)
    assert (code, out) == (2, "")
    assert "is not empty" in err


def test_other_commands_as_json(pruned: Path, tmp_path: Path, run: Printed) -> None:
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    code, out, err = run("verify", pruned, "--json", "-")
    assert (code, json.loads(out)["problems"]) == (0, [])
    assert "21 matrices checked" in err
    code, out, err = run("pack", pruned, packed, "--json", "-")
    assert (code, json.loads(out)["layers"], json.loads(out)["output"]) == (0, 21, str(packed))
    assert "21 matrices packed" in err
    code, out, _ = run("unpack", packed, dense, "--json", "-", "--quiet")
    assert (code, json.loads(out)["layers"]) == (0, 21)
    code, _, err = run("report", pruned, "-o", tmp_path / "r.html", "--json", tmp_path / "r.json")
    assert (code, (tmp_path / "r.html").exists()) == (2, False)
    assert "is what the command writes anyway" in err
    code, out, _ = run("report", pruned, "-o", tmp_path / "r.html", "--json", "-")
    assert json.loads(out) == json.loads((tmp_path / "r.json").read_text())
    (dense / "tokenizer.json").unlink()
    code, out, err = run("verify", dense, "--json", tmp_path / "found.json", "-q")
    assert (code, out, err) == (1, "", "")
    assert len(json.loads((tmp_path / "found.json").read_text())["problems"]) == 1


def test_commands_are_quiet(pruned: Path, tmp_path: Path, run: Printed) -> None:
    assert run("pack", pruned, tmp_path / "packed", "-q") == (0, "", "")
    assert run("verify", tmp_path / "packed", "-q") == (0, "", "")
    assert run("report", pruned, "-o", tmp_path / "r.html", "-q") == (0, "", "")


@pytest.mark.parametrize("arguments", [["verify", "{}"], ["pack", "{}", "{}-packed"], ["report", "{}", "-o", "{}.html"]])
def test_a_file_that_cannot_be_written_is_known_before_the_work(arguments: list[str], pruned: Path, run: Printed) -> None:
    words = [word.format(pruned) for word in arguments]
    before = sorted(pruned.parent.iterdir())
    code, _, err = run(*words, "--json", pruned.parent / "no" / "such.json")
    assert code == 2
    assert "its folder does not exist" in err
    for file, why in ((pruned, "it is a folder"), (pruned / "llmprune.json", "a model lies in its folder")):
        code, _, err = run(*words, "--json", file)
        assert code == 2
        assert why in err
    code, _, err = run(*words, "-q", "-v")
    assert code == 2
    assert "not allowed with" in err
    assert sorted(pruned.parent.iterdir()) == before


def test_every_phase_of_a_run_has_its_memory(folder: Path, tmp_path: Path) -> None:
    record: RunRecord = llmprune.prune(folder, sparsity="2:4", calibration=tokens(4, 16), output=tmp_path / "out").record
    assert record.phase_memory.keys() == record.seconds.keys()
    assert all(peak["process"] > 0 for peak in record.phase_memory.values())


@pytest.mark.parametrize("name", ["", *COMMANDS.names()])
def test_help_shows_an_example_and_needs_nothing_heavy(name: str) -> None:
    code = (
        "import sys; from llmprune.cli.main import main\n"
        "try: main(sys.argv[1:] + ['--help'])\n"
        "except SystemExit: print(*sorted(sys.modules), sep='\\n')"
    )
    printed = subprocess.run([sys.executable, "-c", code, *name.split()], capture_output=True, text=True, check=True).stdout
    for words in (f"example: llmprune {name.replace(DEFAULT, '')}".rstrip(), "--json FILE", "--quiet", "--verbose"):
        assert words in printed
    assert not {"torch", "transformers", "datasets", "rich", "numpy"} & set(printed.splitlines())


BASH = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMPREPLY=()
_shtab_llmprune 2>/dev/null; echo "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion(tmp_path: Path, run: Printed) -> None:
    script = tmp_path / "llmprune.bash"
    script.write_text(run("--print-completion", "bash")[1])

    def completed(words: str) -> set[str]:
        command = BASH.format(script=script, words=words)
        return set(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split())

    assert completed("llmprune --spars") == {"--sparsity"}
    assert completed("llmprune --method s") == {"sparsegpt"}
    assert completed("llmprune --quality b") == {"balanced", "best"}
    assert completed("llmprune un") == {"unpack"}
    assert completed("llmprune push --cre") == {"--create-pr"}


def test_completion_for_other_shells(run: Printed) -> None:
    for shell in ("zsh", "fish"):
        code, out, _ = run("--print-completion", shell)
        assert code == 0
        assert "sparsity" in out
        assert "unpack" in out
    code, out, err = run("--print-completion", "bsh")
    assert (code, out) == (2, "")
    assert "did you mean bash" in err
