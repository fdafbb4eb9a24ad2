"""The report: what it says is what the record says, whatever the record says; and it works in a real browser."""

from __future__ import annotations

import copy
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import BINARY, Tab, tab
from conftest import tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.files import write_whole
from llmprune.cli.main import main
from llmprune.cli.parser import main_parser
from llmprune.cli.terminal import Terminal
from llmprune.job.options import PruneConfig
from llmprune.output.card import model_card
from llmprune.reports import html
from llmprune.reports.page import MOST, content
from llmprune.reports.saved import read_runs

Record = dict[str, Any]
BENCH: Record = {
    "device": "CPU, 2 threads", "dtype": "float32", "memory": 1e9, "weights": {"dense": 100, "packed": 60}, "layers": [],
    "model": [{"phase": "decode", "batch": 8, "tokens": 8, "dense": 0.25, "packed": 0.125}], "advice": ["It is <faster>."],
    "date": "2026-11-21", "versions": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that pruned weights, the same packed, and one that removed neurons; as if perplexity had been measured."""
    home = tmp_path_factory.mktemp("runs")
    tiny_model("llama").save_pretrained(home / "source")
    options: Record = {"calibration": tokens(4, 16), "batch_size": 2}
    llmprune.prune(home / "source", sparsity="2:4", method="wanda", output=str(home / "wanda"), **options)
    llmprune.prune(home / "source", neurons="25%", round_to=4, output=str(home / "smaller"), **options)
    llmprune.prune(home / "source", sparsity="2:4", method="wanda", bits=4, output=str(home / "codes"), **options)
    for name, after in (("wanda", 12.5), ("smaller", 11.25), ("codes", 12.75)):
        change(home / name, lambda record, after=after: measured(record, after))
    assert main(["pack", str(home / "wanda"), str(home / "packed")]) == 0
    return {name: home / name for name in ("wanda", "smaller", "packed", "codes")}


def measured(record: Record, after: float) -> None:
    protocol = {"text": "pydoc", "tokens": 150, "windows": 10, "length": 16}
    record |= {"dense": {"value": 10.0} | protocol, "pruned": {"value": after} | protocol}
    record["arguments"]["calibration"] = "pydoc"


def change(folder: Path, edit: Callable[[Record], object]) -> Path:
    file = folder / "llmprune.json"
    record = json.loads(file.read_text())
    edit(record)
    file.write_text(json.dumps(record))
    return folder


def alone(folder: Path, to: Path) -> Path:
    """The record without the weights, in a folder of its own."""
    to.mkdir(parents=True)
    (to / "llmprune.json").write_bytes((folder / "llmprune.json").read_bytes())
    return to


def with_weights(folder: Path, to: Path) -> Path:
    """A record of its own, beside the same weights."""
    alone(folder, to)
    for file in folder.glob("model*"):
        (to / file.name).symlink_to(file)
    return to


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def cells(value: Any) -> Iterator[Record]:
    """Everything in the twin that is shown: values with their texts."""
    if isinstance(value, dict):
        if value.keys() == {"value", "text"}:
            yield value
        for own in value.values():
            yield from cells(own)
    if isinstance(value, list):
        for own in value:
            yield from cells(own)


def test_records_of_earlier_versions_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """They name neither the dtype of a perplexity nor why one was computed in."""
    found = {"value": 10.0, "text": "pydoc", "tokens": 63, "windows": 1, "length": 64}

    def measured(**more: str) -> Callable[[Record], object]:
        def edit(record: Record) -> None:
            record["dense"] = record["pruned"] = found | more
            if not more:
                del record["compute"]["why"]

        return edit

    pages = [
        content(read_runs([str(change(alone(folders["wanda"], tmp_path / name), edit))]))["runs"][0]["protocol"]
        for name, edit in {"old": measured(), "new": measured(dtype="bfloat16")}.items()
    ]
    assert pages == ["1 window of 64 tokens of pydoc", "1 window of 64 tokens of pydoc, bfloat16"]


def test_numbers_are_the_records(folders: dict[str, Path], tmp_path: Path) -> None:
    assert report(folders["wanda"], "-o", tmp_path / "r.html") == 0
    shown, twin = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())
    record = json.loads((folders["wanda"] / "llmprune.json").read_text())
    [run] = twin["runs"]
    facts = run["facts"]
    assert (facts["perplexity_before"]["value"], facts["perplexity_after"]["value"]) == (10.0, 12.5)
    assert facts["excess_loss"] == {"value": math.log(1.25), "text": "+0.2231"}
    assert facts["zeros"]["text"] == "50.00%"
    assert facts["bytes_after"]["value"] == record["size"]["bytes_after"]
    assert facts["peak_memory"]["value"] == max(record["peak_memory"].values())
    assert run["seconds"] == record["seconds"]
    held = {phase: peak["process"] / 2**20 for phase, peak in record["phase_memory"].items()}
    assert run["phase_memory"] == {"of": "process", "mebibytes": held}
    assert held.keys() == record["seconds"].keys()
    assert 0 < max(held.values()) < 1.02 * record["peak_memory"]["process"] / 2**20
    assert run["versions"] == record["versions"]
    errors = [site["error"] for site in record["sites"]]
    assert sorted(error for row in run["maps"]["error"]["values"] for error in row) == sorted(errors)
    assert run["growth"]["largest"][0] == max(site["error"] for site in record["sites"] if site["block"] == 0)
    assert [row[5]["value"] for row in run["matrices"]["rows"]] == errors
    for cell in ("10.000", "12.500", "+0.2231", "50.00%", *(row[5]["text"] for row in run["matrices"]["rows"])):
        assert cell in shown
    for package, version in record["versions"].items():
        assert f"{package} {version}" in shown


def test_a_quantised_run_shows_its_codes(folders: dict[str, Path], tmp_path: Path) -> None:
    assert report(folders["codes"], "-o", tmp_path / "r.html") == 0
    shown, twin = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())
    record = json.loads((folders["codes"] / "llmprune.json").read_text())
    [run] = twin["runs"]
    assert [row[5]["value"] for row in run["codes"]["rows"]] == [one["error"] for one in record["codes"]]
    assert {row[3]["value"] for row in run["codes"]["rows"]} == {one["group"] for one in record["codes"]}
    drawn = sorted(error for row in run["maps"]["rounding"]["values"] for error in row)
    assert drawn == sorted(one["error"] for one in record["codes"])
    ((bits,),) = [[row[2]] for row in run["sizes"]["rows"] if row[0]["text"].startswith("bits a weight")]
    taken = sum((4 + 32 / one["group"]) * one["shape"][0] * one["shape"][1] for one in record["codes"])
    weights = sum(one["shape"][0] * one["shape"][1] for one in record["codes"])
    assert bits["value"] == pytest.approx(taken / weights)
    assert "Error of rounding by matrix" in shown
    assert "Every rounded matrix" in shown


@pytest.mark.parametrize("names", [["wanda"], ["smaller"], ["codes"], ["wanda", "smaller", "packed", "codes"]], ids="+".join)
def test_the_twin_holds_what_the_page_shows(names: list[str], folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert report(*(folders[own] for own in names), "-o", tmp_path / f"{name}.html") == 0
    shown, twin = (tmp_path / "a.html").read_text(), json.loads((tmp_path / "a.json").read_text())
    hidden = {"parameters", "output_error"} | ({"peak_memory"} if len(names) == 1 else {"parameters_after", "seconds_in_all"})
    for run in twin["runs"]:
        run["facts"] = {name: fact for name, fact in run["facts"].items() if name not in hidden and fact["value"] is not None}
        run |= {name: run[name] if len(names) == 1 else None for name in ("matrices", "codes")}
    assert not [cell["text"] for cell in cells(twin) if escape(cell["text"], quote=False) not in shown]
    assert shown.replace("a.json", "b.json") == (tmp_path / "b.html").read_text()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert len(shown) < 1e6


def test_masks_are_those_on_disk(folders: dict[str, Path]) -> None:
    dense, packed = (content(read_runs([str(folders[name])]))["runs"][0] for name in ("wanda", "packed"))
    assert dense["masks"] == packed["masks"]
    assert len(dense["masks"]) == 4
    weight = llmprune.load(folders["wanda"], dense=True, device="cpu").get_submodule(dense["masks"][0]["site"]).weight
    assert dense["masks"][0]["corner"] == (weight[:12, :24] != 0).int().tolist()
    for mask in dense["masks"]:
        assert all(sum(row[at : at + 4]) == 2 for row in mask["corner"] for at in range(0, len(row), 4))
    sizes = {row[0]["text"]: row for row in packed["sizes"]["rows"]}
    before, after = (sizes["weight bytes, packed"][column]["value"] for column in (1, 2))
    assert after < before
    assert packed["facts"]["bytes_after"]["value"] == after


def test_structure_is_shown_by_layer(folders: dict[str, Path]) -> None:
    record = json.loads((folders["smaller"] / "llmprune.json").read_text())
    [run] = content(read_runs([str(folders["smaller"])]))["runs"]
    assert run["kept"]["texts"] == [[f"{gone['kept']} of {gone['count']}" for gone in record["removals"]]]
    sizes = {row[0]["text"]: (row[1]["value"], row[2]["value"]) for row in run["sizes"]["rows"]}
    before, after = record["structure"]["before"], record["structure"]["after"]
    assert sizes["multiplications a token"] == (before["macs_a_token"], after["macs_a_token"])
    assert run["facts"]["zeros"] == {"value": None, "text": "none"}
    assert run["masks"] == []


def test_the_fit_of_blocks_is_shown(folders: dict[str, Path], tmp_path: Path) -> None:
    own = {"steps": 4, "rate": 0.02, "nbytes": 8, "seconds": 0.5}
    fits = [{"block": block, "before": 0.2, "after": 0.1 / (1 + block)} | own for block in range(3)]
    folder = change(alone(folders["wanda"], tmp_path / "run"), damage(reconstructions=fits))
    [run] = (page := content(read_runs([str(folder)])))["runs"]
    assert run["fit"] == {"blocks": [0, 1, 2], "before": [0.2] * 3, "after": [fit["after"] for fit in fits]}
    assert "Fit of the blocks" in html.render(page, "r.json")
    change(folder, lambda record: record["reconstructions"][1].update(after=0.3))
    assert "reconstructions[1].after" in refusal(folder / "llmprune.json")


def test_what_was_not_measured_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = change(alone(folders["wanda"], tmp_path / "run"), lambda record: record.update(dense=None, pruned=None))
    assert report(folder, "-o", tmp_path / "r.html") == 0
    shown = (tmp_path / "r.html").read_text()
    assert "Not measured: the run had no evaluation text" in shown
    assert shown.count(">not measured<") == 2
    assert "perplexity: open before" not in shown


def test_a_bench_is_shown(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    assert report(folders["packed"], "-o", tmp_path / "r.html", "--bench", tmp_path / "bench.json") == 0
    shown = (tmp_path / "r.html").read_text()
    for text in ("2.00x", ">32<", ">64<", "CPU, 2 threads, float32, 2026-11-21", "It is &lt;faster&gt;."):
        assert text in shown


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": "2:4", "method": "wanda", "samples": 16, "true_sequential": False, "refit": True},
        {"heads": "25%", "neurons": "3", "per_layer": True, "model": "-odd 'name'", "overwrite": True},
        {"sparsity": "50%", "skip": ["*.down_proj", "--x"], "only": ["*"], "output": "a b", "eval_text": "none"},
        {"sparsity": "2:4", "push_to_hub": "me/tiny", "output": "-x", "restart": True, "activations": "disk"},
    ],
    ids=["weights", "structure", "globs", "no part of the result"],
)
def test_the_command_repeats_the_run(options: Record, folders: dict[str, Path], tmp_path: Path) -> None:
    config = PruneConfig.create({"model": "llama", "output": "auto"} | options)
    arguments = {name: getattr(config, name) for name in PruneConfig.__dataclass_fields__}
    folder = change(alone(folders["wanda"], tmp_path / "run"), lambda record: record.update(arguments=arguments))
    words = shlex.split(content(read_runs([str(folder)]))["runs"][0]["command"])
    options = main_parser().read(words[1:])
    assert Terminal.take(options) == Terminal()
    again = PruneConfig.create({"output": "auto"} | options)
    left_out = {"output": "auto", "overwrite": False, "restart": False, "push_to_hub": None, "activations": "memory"}
    assert again == PruneConfig.create(arguments | left_out)


def test_the_report_and_the_card_show_one_command(folders: dict[str, Path], tmp_path: Path) -> None:
    """By several processes, of a model on the Hub."""

    def pin(record: Record) -> None:
        record["model"] |= {"hub_id": "acme/tiny", "commit": "c0ffee"}
        record["arguments"] |= {"model": "acme/tiny@main", "push_to_hub": "me/tiny", "overwrite": True}
        record["compute"]["processes"] = 4

    (run,) = read_runs([str(change(alone(folders["wanda"], tmp_path / "run"), pin))])
    command = content([run])["runs"][0]["command"]
    assert command == (
        "torchrun --nproc-per-node 4 -m llmprune --model acme/tiny@c0ffee --sparsity 2:4 --method wanda "
        "--calibration pydoc --batch-size 2"
    )
    assert f"```bash\n{command}\n```" in model_card(run.record, "tiny")


@pytest.mark.parametrize("edit", [
    lambda record: record["arguments"].update(calibration="given tokens"),
    lambda record: record["arguments"].update(model=record["model"]["class"]),
], ids=["tokens", "model"])  # fmt: skip
def test_what_was_in_memory_has_no_command(edit: Callable[[Record], object], folders: dict[str, Path], tmp_path: Path) -> None:
    (run,) = read_runs([str(change(alone(folders["wanda"], tmp_path / "run"), edit))])
    assert content([run])["runs"][0]["command"] is None
    words = "It was made from Python, of a model in memory or with tokens of its own, so no command makes it again"
    assert report(run.file, "-o", tmp_path / "r.html") == 0
    assert words in (tmp_path / "r.html").read_text()
    assert words in model_card(run.record, "tiny")


def test_a_deep_model_and_many_runs_stay_small(folders: dict[str, Path], tmp_path: Path) -> None:
    def deepen(record: Record) -> None:
        own = [site for site in record["sites"] if site["block"] == 0]
        record["model"]["blocks"] = 96
        record["sites"] = [site | {"block": block} for block in range(96) for site in own]

    deep = change(alone(folders["wanda"], tmp_path / "deep"), deepen)
    assert report(deep, "-o", tmp_path / "deep.html") == 0
    many = [with_weights(folders["wanda"], tmp_path / f"run{number}") for number in range(MOST)]
    assert report(*many, "-o", tmp_path / "many.html") == 0
    assert max((tmp_path / name).stat().st_size for name in ("deep.html", "many.html")) < 1e6
    assert report(deep, *many, "-o", tmp_path / "more.html") == 2


def damage(**changes: object) -> Callable[[Record], object]:
    return lambda record: record.update(changes)


DAMAGES: dict[str, tuple[Callable[[Record], object], str]] = {
    "schema": (damage(schema=99), "has schema"),
    "nothing": (lambda record: record.clear(), "is no record of a run"),
    "sites": (damage(sites="none"), "sites should be a list"),
    "block": (lambda r: r["sites"][1].update(block=10**12), "sites[1].block should be 0 to 2"),
    "shape": (lambda r: r["sites"][0].update(shape=[4]), "sites[0].shape should be a list of length 2"),
    "not a number": (lambda r: r["sites"][0].update(error=math.nan), "sites[0].error should be a finite number"),
    "huge": (lambda r: r["size"].update(bytes_before=10**400), "size.bytes_before should be a whole number"),
    "perplexity": (lambda r: r["dense"].update(value=0), "dense.value should be a finite number > 0"),
    "huge perplexity": (lambda r: r["dense"].update(value=10**400), "dense.value should be a finite number"),
    "seconds": (lambda r: r["seconds"].update(solve=-1), "seconds[...] should be a finite number >= 0"),
    "missing": (lambda r: r["sites"][0].pop("block"), "sites[0].block is missing"),
    "amount": (lambda r: r["arguments"].update(heads=10**400), "heads '1000"),
    "option": (lambda r: r["arguments"].update(samples="many"), "samples must be a whole number"),
    "tensor": (lambda r: r["sites"][0].update(tensor="other.weight"), "holds no tensor other.weight"),
    "part": (lambda r: r["sites"][0].update(part="a:b"), "has no part"),
    "size": (lambda r: r["sites"][0].update(shape=[2, 2]), "in the record"),
    "pattern": (lambda r: r["sites"][0].update(pattern="sparse"), "is not a pattern"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_record_is_one_line(
    name: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, words = DAMAGES[name]
    folder = with_weights(folders["wanda"], tmp_path / "run")
    assert report(change(folder, edit), "-o", tmp_path / "r.html") == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(folder) in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a record; of a list, in its first member only."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, own in inner:
        yield from places(own, (*path, name))


def test_what_another_version_wrote_besides_is_passed_over(folders: dict[str, Path], tmp_path: Path) -> None:
    def extend(record: Record) -> None:
        for part in (record, record["arguments"], record["model"], record["sites"][0], record["dense"]):
            part["later"] = {"x": [None]}

    folder = change(alone(folders["wanda"], tmp_path / "run"), extend)
    (run,), (plain,) = read_runs([str(folder)]), read_runs([str(folders["wanda"])])
    assert (run.config, run.record.sites, run.record.dense) == (plain.config, plain.record.sites, plain.record.dense)


def refusal(file: Path) -> str:
    """Why no report can be made of a record; nothing where one can."""
    try:
        json.dumps(content(read_runs([str(file)])))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["wanda", "smaller"])
def test_every_field_may_be_missing_or_wrong(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = alone(folders[name], tmp_path / "run") / "llmprune.json"
    whole = json.loads(file.read_text())
    refused = set()
    for place in places(whole):
        for wrong in (None, [], {}, "text", -1, True, "missing"):
            record = copy.deepcopy(whole)
            owner = record
            for step in place[:-1]:
                owner = owner[step]
            if wrong == "missing":
                del owner[place[-1]]
            else:
                owner[place[-1]] = wrong
            file.write_text(json.dumps(record))
            if error := refusal(file):
                assert str(file) in error
                assert "\n" not in error
                refused.add(place[0])
    assert refused >= whole.keys() - {"reconstructions"}


def test_bad_input_is_one_line(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = alone(folders["wanda"], tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "pipe.html").symlink_to("/dev/null")
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "twin.json").write_text("mine")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text('{"schema"')
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "zero.json").write_text(json.dumps(BENCH | {"model": [BENCH["model"][0] | {"packed": 0}]}))
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "r.html"
    for arguments, words in [
        ([tmp_path / "none", "-o", out], "does not exist"),
        ([tmp_path / "empty", "-o", out], "holds no llmprune.json"),
        ([tmp_path / "list.json", "-o", out], "is not a JSON object"),
        ([tmp_path / "cut.json", "-o", out], "is not JSON"),
        ([run, run / "llmprune.json", "-o", out], "given twice"),
        ([run, "-o", tmp_path / "no" / "r.html"], "its folder does not exist"),
        ([run, "-o", tmp_path / "folder.html"], "it is a folder"),
        ([run, "-o", tmp_path / "pipe.html", "--overwrite"], "no ordinary file"),
        ([run, "-o", tmp_path / "there.html"], "is there already"),
        ([run, "-o", tmp_path / "twin.html"], "is there already"),
        ([run, "-o", tmp_path / "r.json"], "end it with .html"),
        ([run, "-o", run / "llmprune.html", "--overwrite"], "a model lies in its folder"),
        ([run, "-o", tmp_path / "bench.html", "--overwrite", "--bench", tmp_path / "bench.json"], "made from"),
        ([folders["wanda"], "-o", folders["wanda"] / "r.html"], "a model lies in its folder"),
        ([run, "-o", out, "--bench", tmp_path / "other.json"], "is not what llmprune bench"),
        ([run, "-o", out, "--bench", tmp_path / "zero.json"], "model[0].packed should be a finite number > 0"),
        ([run, folders["smaller"], "-o", out, "--bench", tmp_path / "bench.json"], "1 bench file for 2 runs"),
        (["-o", out], "required"),
        ([run, "--outptu", out], "did you mean --output"),
    ]:
        assert report(*arguments) == 2, words
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwrite_replaces_the_page_and_its_twin(folders: dict[str, Path], tmp_path: Path) -> None:
    run, out = alone(folders["wanda"], tmp_path / "run"), tmp_path / "r.html"
    out.write_text("mine")
    assert report(run, "-o", out, "--overwrite") == 0
    assert out.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "run"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").write_text("old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_whole({tmp_path / "a": "new", tmp_path / "b": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b").read_text() == "old"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_one_line(
    package: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "llmprune.reports.figures", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.style", None)
    run = alone(folders["wanda"], tmp_path / "run")
    assert report(run, "-o", tmp_path / "r.html") == 2
    assert "pip install jinja2 matplotlib" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Tags(HTMLParser):
    """The tags of a page, with the names of their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, set[str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name for name, _ in attrs}))


HOSTILE = st.sampled_from(
    [
        "<script>alert(1)</script>",
        "\"><img src=x onerror='x()'>",
        "'\"&<>`",
        "$\\frac{1}",
        "]]>-->",
        "\ud800",
        "\x00\n",
        "_",
        "\U0001d518",
    ]
)


@settings(max_examples=12, deadline=None)
@given(texts=st.lists(st.one_of(HOSTILE, st.text(max_size=40)), min_size=9, max_size=9))
def test_hostile_text_stays_text(texts: list[str], folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    def spoil(record: Record) -> None:
        record["sites"] = [site for site in record["sites"] if site["block"] == 0][:2]
        record["sites"][0]["name"], record["compute"]["device"] = texts[:2]
        record["model"]["name"], record["recipe"]["text"], record["calibration"]["text"] = texts[2:5]
        record["dense"]["text"] = record["pruned"]["text"] = texts[5]
        record["seconds"], record["versions"] = {texts[6]: 1.0}, {texts[6]: texts[7]}
        record["peak_memory"], record["skipped"] = {texts[8]: 1}, {texts[7]: texts[8]}
        record["arguments"]["model"] = texts[2]

    home = tmp_path_factory.mktemp("hostile")
    run = change(alone(folders["wanda"], home / "<i>b"), spoil)
    page = content(read_runs([str(run)]))
    target = home / "r.html"
    write_whole({target: html.render(page, "r.json"), home / "r.json": html.as_json(page)})
    tags = Tags(target.read_text(encoding="utf-8")).found
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not [tag for tag, names in tags if tag in ("img", "i", "iframe") or any(name.startswith("on") for name in names)]
    assert json.loads((home / "r.json").read_text()) == page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if BINARY is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with tab(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def test_in_a_browser(browser: Tab, folders: dict[str, Path], tmp_path: Path) -> None:
    change(unmeasured := alone(folders["wanda"], tmp_path / "unmeasured"), damage(dense=None, pruned=None))
    assert report(*folders.values(), unmeasured, "-o", tmp_path / "all.html") == 0
    assert report(folders["wanda"], "-o", tmp_path / "one.html") == 0
    for name in ("one", "all"):
        for width, scheme in ((1280, "light"), (390, "dark")):
            browser.open(tmp_path / f"{name}.html", width=width, scheme=scheme)
            assert browser.run("innerWidth") == width
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("document.querySelectorAll('svg').length") >= 6
            browser.picture(tmp_path / f"{name}-{width}.png")
            assert (tmp_path / f"{name}-{width}.png").stat().st_size > 20_000
            assert browser.run("getComputedStyle(document.body).backgroundColor") == (
                "rgb(246, 247, 249)" if scheme == "light" else "rgb(15, 19, 25)"
            )
    measured = ["11.250", "12.500", "12.500", "12.750"]
    check_sorting(browser, "after", [*measured, "not measured"], [*reversed(measured), "not measured"])
    names = ["codes", "packed", "smaller", "unmeasured", "wanda"]
    check_sorting(browser, "run", names, names[::-1])
    assert browser.told("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled") == []
    asked = {event["request"]["url"] for event in browser.told("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {(tmp_path / f"{n}.html").as_uri() for n in ("one", "all")}


def check_sorting(browser: Tab, column: str, up: list[str], down: list[str]) -> None:
    """Two clicks on a column's name sort the rows one way and the other."""
    heads = "[...document.querySelectorAll('.compared th')]"
    at = browser.run(f"{heads}.findIndex((head) => head.textContent === '{column}')")
    for order, wanted in (("ascending", up), ("descending", down)):
        browser.run(f"{heads}[{at}].querySelector('button').click()")
        assert browser.run(f"{heads}.map((head) => head.getAttribute('aria-sort')).filter((sort) => sort !== 'none')") == [
            order
        ]
        assert (
            browser.run(f"[...document.querySelectorAll('.compared tbody tr')].map((r) => r.cells[{at}].textContent)") == wanted
        )
