"""`llmprune eval`: the real lm-eval on dense, pruned and packed models, and perplexity beside it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.base import hardware
from llmprune.base.errors import InputError
from llmprune.cli.main import main
from llmprune.measure.evaluate import Score, evaluate
from llmprune.models.resolve import resolve
from llmprune.output.verify import verify

TASKS = Path(__file__).parent.parent / "eval" / "tasks"
QUICK = {"task_path": TASKS, "limit": 3, "seqlen": 64, "windows": 2, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "pruned"
    llmprune.prune("llama", sparsity="2:4", method="magnitude", output=folder, samples=2, seqlen=64, eval_text="none")
    return folder


def test_pruned_beside_dense_and_packed_beside_pruned(pruned: Path, tmp_path: Path) -> None:
    tasks = ["pydoc_perplexity", "pydoc_continuation", "pydoc_summary"]
    found = evaluate(pruned, tasks=tasks, texts=["pydoc"], baseline="llama", **QUICK)
    assert found.baseline_scores is not None
    names = [score.name for score in found.scores]
    assert names[0] == "token perplexity of pydoc"
    assert {"lm-eval pydoc_perplexity word_perplexity", "lm-eval pydoc_summary acc"} <= set(names)
    assert [score.name for score in found.baseline_scores] == names
    assert found.scores[0].value > found.baseline_scores[0].value
    by_name = {score.name: score for score in found.scores}
    assert by_name["lm-eval pydoc_continuation acc"].protocol == "3 documents"
    assert by_name["lm-eval pydoc_continuation acc"].error is not None
    assert not by_name["lm-eval pydoc_perplexity byte_perplexity"].higher_is_better
    llmprune.pack(pruned, tmp_path / "packed")
    packed = evaluate(tmp_path / "packed", tasks=tasks, texts=["pydoc"], **QUICK)
    for one, other in zip(found.scores, packed.scores, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4)


def test_results_go_into_the_record_once_each(pruned: Path, tmp_path: Path) -> None:
    llmprune.pack(pruned, tmp_path / "packed", overwrite=True)
    for folder, several in ((pruned, (1, 1, 3)), (tmp_path / "packed", (5,))):
        before = len(json.loads((folder / "llmprune.json").read_text()).get("evaluations", []))
        for windows in several:
            found = evaluate(folder, **(QUICK | {"windows": windows}))
        record = json.loads((folder / "llmprune.json").read_text())
        assert len(record["evaluations"]) == before + len(set(several))
        assert record["evaluations"][-1]["scores"][0]["value"] == found.scores[0].value
        assert verify(folder).problems == ()


def test_token_perplexity_is_that_of_the_papers(pruned: Path) -> None:
    """Against the whole model by hand: disjoint windows, exp of the mean loss of every predicted token."""
    (score,) = evaluate(pruned, **QUICK).scores
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32), AutoTokenizer.from_pretrained(pruned)
    from llmprune.data.pydoc import documents

    ids = torch.tensor(tokenizer("\n\n".join(documents("evaluation")))["input_ids"][:128]).view(2, 64)
    with torch.no_grad():
        loss = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids]).mean()
    assert score.value == pytest.approx(math.exp(loss), rel=1e-4)
    assert score.protocol == "2 windows x 64 tokens, float32"


def test_a_baseline_is_measured_in_the_model_s_dtype(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is stored in: what is computed in two would not compare."""
    monkeypatch.setattr(hardware, "bfloat16_products", lambda: 4.0)
    AutoModelForCausalLM.from_pretrained(resolve("llama").path, dtype=torch.float32).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(resolve("llama").path).save_pretrained(tmp_path / "wide")
    found = evaluate(pruned, baseline=tmp_path / "wide", **QUICK | {"dtype": "auto"})
    narrow, wide = (evaluate("llama", **QUICK | {"dtype": dtype}).scores[0] for dtype in ("auto", "float32"))
    assert found.baseline_scores == [narrow]
    assert narrow.protocol == "2 windows x 64 tokens, bfloat16"
    assert narrow.value != wide.value


def test_our_tasks_are_deterministic_and_fair() -> None:

    sys.path.insert(0, str(TASKS / "pydoc"))
    try:
        import documentation
    finally:
        sys.path.pop(0)
    for build in (documentation.continuations, documentation.summaries):
        rows, again = (build()["test"].to_list() for _ in range(2))
        assert rows == again
        assert len(rows) == 200
        assert all(len(set(row["choices"])) == 4 for row in rows)
        places = [row["label"] for row in rows]
        assert all(30 <= places.count(place) <= 70 for place in range(4))
    assert len(documentation.passages()["test"]) > 50


def test_recovery_is_turned_so_that_more_is_better() -> None:
    accuracy, worse = Score("acc", "", 0.5, None, True), Score("acc", "", 0.4, None, True)
    assert worse.recovery(accuracy) == pytest.approx(0.8)
    low, high = Score("ppl", "", 20.0, None, False), Score("ppl", "", 25.0, None, False)
    assert high.recovery(low) == pytest.approx(0.8)


def test_the_command_shows_a_table_or_json(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(pruned), "--windows", "1", "--seqlen", "32", "--device", "cpu", "--baseline", "llama"]
    assert main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    for words in ("token perplexity of pydoc", "1 window x", "recovery", "difference"):
        assert words in shown
    assert main([*arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == json.loads((tmp_path / "found.json").read_text())["scores"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--tasks", "pydoc_sumary", "--task-path", str(TASKS)], "unknown task 'pydoc_sumary'; did you mean pydoc_summary"),
    (["--tasks", "pydoc_summary", "--task-path", "nowhere"], "task path nowhere is no folder"),
    (["--texts", "nothing.txt"], "text file nothing.txt does not exist"),
    (["--limit", "0"], "limit must be at least 1"),
    (["--seqlen", "1"], "seqlen must be at least 2"),
    (["--fewshot", "-1"], "fewshot -1 is impossible"),
    (["--baseline", "lama"], "did you mean llama"),
    (["--json", "/nowhere/x.json"], "its folder does not exist"),
    (["--task", "x"], "did you mean --tasks"),
])  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "llama", "--windows", "1", "--seqlen", "8", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_model_without_a_tokenizer(saved) -> None:
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        evaluate(saved(tiny_model("llama")), **QUICK)


def test_away_from_a_terminal_only_ours_is_printed(pruned: Path, tmp_path: Path) -> None:
    """No bars of libraries, and nothing of git's where there is no repository."""
    command = ["eval", str(pruned), "--texts", "pydoc", "--windows", "1", "--seqlen", "16", "--device", "cpu"]
    command += ["--tasks", "pydoc_summary", "--task-path", str(TASKS), "--limit", "2"]
    done = subprocess.run([sys.executable, "-m", "llmprune", *command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pydoc_summary" in done.stdout
    assert "\r" not in done.stdout
    assert "fatal" not in done.stdout


def test_bundled_model_is_left_alone() -> None:
    assert not (resolve("llama").path / "llmprune.json").exists()


def evaluations(folder: Path) -> int:
    return len(json.loads((folder / "llmprune.json").read_text()).get("evaluations", []))


def test_what_is_measured_goes_to_the_folder_that_was_measured(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundled name is the bundled model, a path the folder, also from `~` and where both have one name."""
    shutil.copytree(pruned, tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = evaluations(tmp_path / "llama")
    assert main(["eval", "llama", "--windows", "1", "--seqlen", "9", "--device", "cpu"]) == 0
    assert "llama (a folder here of that name is ./llama): loading" in capsys.readouterr().out
    assert evaluations(tmp_path / "llama") == before
    bundled, *own = (evaluate(one, **QUICK | {"seqlen": 9}).scores[0].value for one in ("llama", "~/llama", Path("llama")))
    assert own[0] == own[1] != bundled
    assert evaluations(tmp_path / "llama") == before + 1


def test_a_snapshot_in_the_hub_s_cache_is_left_alone(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = shutil.copytree(pruned, tmp_path / "cache" / "models--me--pruned" / "snapshots" / "0" / "")
    before = evaluations(snapshot)
    evaluate(snapshot, **QUICK)
    assert evaluations(snapshot) == before
