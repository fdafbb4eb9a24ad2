"""What a run shows, on a terminal of 80 columns and away from one."""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_model, tokens
from rich.console import Console as RichConsole

import llmprune
from llmprune.base import hardware
from llmprune.cli.console import Console
from llmprune.cli.main import main
from llmprune.cost import energy
from llmprune.job.record import COMPUTED, Perplexity, RunRecord
from llmprune.output.card import model_card
from llmprune.reports.page import content
from llmprune.reports.saved import read_runs

NOTE = "seqlen 2048 is capped at the model's 512 positions, and this note goes on for longer than a line of eighty columns has"
TEXT = "/a/folder/of/many/names/that/no/line/of/eighty/columns/holds/together/with/numbers/text.txt"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRecord]:
    """Of a run that pruned weights, and of one that removed neurons and heads."""
    home = tmp_path_factory.mktemp("runs")
    tiny_model("llama").save_pretrained(home / "source")
    options = {"calibration": tokens(4, 16), "batch_size": 2}
    asked = {"weights": {"sparsity": "2:4", "method": "wanda"}, "structure": {"heads": "2", "neurons": "50%"}}
    return {name: llmprune.prune(home / "source", output=home / name, **own, **options).record for name, own in asked.items()}


def evaluated(record: RunRecord, text: str = "pydoc") -> RunRecord:
    """As if perplexity had been measured."""
    found = Perplexity(text=text, value=12.5, tokens=150, windows=238, length=512, dtype="float32")
    return replace(record, dense=found, pruned=found)


def shown(record: RunRecord, *, terminal: bool, output: Path | None = Path("out"), width: int = 80) -> list[str]:
    """The lines that a console shows, without the live bar's."""
    stream = io.StringIO()
    rich = RichConsole(file=stream, force_terminal=terminal, width=width, highlight=False)
    with Console(rich) as console:
        console.header(record, "pattern", "2:4 in 21 matrices, 0 left out")
        console.note(NOTE)
        console.start(3, len(record.sites))
        for block in range(3):
            for site in (site for site in record.sites if site.block == block):
                console.site(site)
            for removal in (removal for removal in record.removals if removal.block == block):
                console.removed(removal)
            console.block(block)
        console.summary(record, output)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()))
    return [line.rstrip() for line in lines if line.strip() and "━ " not in line and "sites" not in line]


def words(lines: list[str]) -> list[str]:
    return " ".join(lines).split()


def until_table(lines: list[str]) -> list[str]:
    return lines[: next(number for number, line in enumerate(lines) if line.startswith("┏"))]


@pytest.mark.parametrize("name", ["weights", "structure"])
def test_lines_break_between_words_and_go_on_under_their_value(name: str, records: dict[str, RunRecord]) -> None:
    record = evaluated(records[name])
    narrow, whole = shown(record, terminal=True), shown(record, terminal=False)
    before, plain = until_table(narrow), until_table(whole)
    assert words(before) == words(plain)
    assert max(map(len, before)) <= 80 < max(map(len, plain))
    titles = re.compile(
        r"(model        |pattern      |method       |calibration  |compute      |needs        |note: |block ./3  )\S"
    )
    assert all(titles.match(line) for line in plain)
    indent = 0
    for line in before:
        if title := titles.match(line):
            indent = len(title[1])
        else:
            assert line[:indent].isspace()
            assert line[indent] != " "
    for line in before:  # a matrix and its error stay together
        assert not re.search(r"_proj$", line)


@pytest.mark.parametrize("name", ["weights", "structure"])
@pytest.mark.parametrize("text", ["pydoc", TEXT])
def test_the_table_fits_a_terminal_and_is_whole_elsewhere(name: str, text: str, records: dict[str, RunRecord]) -> None:
    record = evaluated(records[name], text)
    tables = [[line for line in shown(record, terminal=terminal) if line[0] in "┏┃┡│├└"] for terminal in (True, False)]
    narrow, whole = tables
    assert max(map(len, narrow)) <= 80
    assert len({len(line) for line in whole}) == 1
    assert any(f"│ perplexity ({text}, 238 windows x 512 tokens, float32) " in line for line in whole)
    labels = [line.split("│")[1].strip() for line in whole if line.startswith("│")]
    together = "".join("".join(line.split("│")[1].split()) for line in narrow if line.startswith("│"))
    assert together == "".join("".join(label.split()) for label in labels)


def test_what_is_computed_is_not_said_to_be_measured(records: dict[str, RunRecord], tmp_path: Path) -> None:
    """In the table, the model card and the report alike; and it is in words."""
    record = evaluated(records["structure"])
    labels = [line.split("│")[1].strip() for line in shown(record, terminal=False) if line.startswith("│")]
    at = labels.index(COMPUTED)
    sizes = ["parameters", "multiplications a token", "bytes of keys and values a token", energy.TITLE]
    assert labels[at + 1 :] == [*sizes, "weight bytes"]
    assert {"loss, nats a token more", "pruning time / time of its forward passes"} <= set(labels[:at])
    measured, _, computed = model_card(record, "out").partition(f"\n\n| {COMPUTED} | |\n")
    assert "| measured in this run | |" in measured
    assert "| token perplexity before (pydoc, 238 windows of 512 tokens, float32) | 12.500 |" in measured
    assert "token perplexity, 238 windows of 512 tokens, float32" in measured
    assert not [size for size in sizes if size in measured]
    assert all(f"| {size}, before and after | " in computed for size in sizes)
    assert "| measured in this run | |" not in model_card(records["structure"], "out")
    tiny_model("llama").save_pretrained(tmp_path / "source")
    llmprune.prune(tmp_path / "source", neurons="50%", calibration=tokens(2, 8), output=tmp_path / "out")
    rows = content(read_runs([str(tmp_path / "out")]))["runs"][0]["sizes"]["rows"]
    assert [row[0]["text"] for row in rows] == [*sizes, "weight bytes"]


@pytest.mark.parametrize(("asked", "speed", "words"), [
    ("auto", 4.42, "bfloat16 on cpu (stored so, and its products are 4.4x as fast as float32's here)"),
    ("auto", 0.6, "float32 on cpu (bfloat16 products are 0.6x as fast here)"),
    ("bfloat16", 0.6, "bfloat16 on cpu"),
])  # fmt: skip
def test_the_header_says_which_dtype_and_why(
    asked: str, speed: float, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the table which it was measured in."""
    monkeypatch.setattr(hardware, "bfloat16_products", lambda: speed)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(" ".join(str(n) for n in range(3000)))
    run = ["--model", "llama", "--calibration", "text.txt", "--samples", "2", "--seqlen", "64", "--eval-text", "text.txt"]
    assert main([*run, "--sparsity", "2:4", "--method", "magnitude", "--dtype", asked, "--output", "out"]) == 0
    shown, dtype = capsys.readouterr().out, words.split()[0]
    assert f"\ncompute      {words}\n" in shown
    assert re.search(rf"│ perplexity \(text.txt, \d+ windows x 64 tokens, {dtype}\) ", shown)
    record = read_runs(["out"])[0].record
    assert words == record.compute["dtype"] + " on cpu" + (f" ({record.compute['why']})" if record.compute["why"] else "")


def test_a_run_without_evaluation_ends_with_the_command_that_evaluates(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(" ".join(str(n) for n in range(3000)))
    run = ["--model", folder.name, "--calibration", "text.txt", "--samples", "4", "--seqlen", "64"]
    assert main([*run, "--sparsity", "2:4", "--method", "magnitude", "--output", "the output"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "  llmprune eval 'the output' --baseline source"
    assert main([*shlex.split(last)[1:], "--windows", "1", "--seqlen", "32"]) == 0
    assert "token perplexity of pydoc" in capsys.readouterr().out
    assert main([*run, "--sparsity", "50%", "--method", "magnitude", "--eval-text", "text.txt", "--output", "evaluated"]) == 0
    assert "llmprune eval" not in capsys.readouterr().out
