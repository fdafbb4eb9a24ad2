"""The page of a scan: what it says is what the scan and its proposals say, whatever those say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import BINARY, tab
from conftest import tiny_model, tokens
from test_families import EXPERTS

import llmprune
from llmprune.base.errors import InputError


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("scan")
    tiny_model("mixtral", **EXPERTS["mixtral"]).save_pretrained(home / "source")
    llmprune.scan(home / "source", home / "scan", calibration=tokens(4, 16), batch_size=2)
    return home / "scan"


def page_of(folder: Path, tmp_path: Path) -> dict:
    llmprune.report(folder, tmp_path / "page.html", overwrite=True)
    return json.loads((tmp_path / "page.json").read_text())["scan"]


def test_it_says_what_was_measured(scanned: Path, tmp_path: Path) -> None:
    said, scan = page_of(scanned, tmp_path), json.loads((scanned / "scan.json").read_text())
    by_name = {one["name"]: one for one in scan["matrices"]}
    assert [row[0]["value"] for row in said["matrices"]["rows"]] == list(by_name)
    for row in said["matrices"]["rows"]:
        one = by_name[row[0]["value"]]
        values = [one["nats"], one["errors"]["50%"], one["errors"]["70%"], one["errors"]["2:4"], one["outliers"]]
        assert [cell["value"] for cell in row[2:]] == values
    name = next(name for name in by_name if "*" in name)  # a layer's experts of one kind are one
    assert next(row for row in said["matrices"]["rows"] if row[0]["value"] == name)[1]["value"].startswith("4 x ")
    nats = said["nats"]
    kind, block = nats["rows"].index("q_proj"), nats["blocks"].index(1)
    assert nats["values"][kind][block] == by_name["model.layers.1.self_attn.q_proj"]["nats"]
    own = [one["errors"]["50%"] for one in scan["matrices"] if one["kind"] == "v_proj"]
    assert dict(map(tuple, said["curves"]["v_proj"]))[0.5] == pytest.approx(sum(own) / len(own))


def test_it_says_what_is_proposed(scanned: Path, tmp_path: Path) -> None:
    """An allocation that was edited is shown as it is now."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in scanned.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "allocation-60pct.json").write_text(json.dumps({"*.q_proj": "25%", "*.k_proj": "dense", "*": "1:4"}))
    proposals = {one["title"]: one for one in page_of(folder, tmp_path)["proposals"]}
    assert set(proposals) == {"50%", "60%", "70%", "2:4"}
    shown = proposals["60%"]["map"]
    rows = dict(zip(shown["rows"], shown["values"], strict=True))
    assert set(rows["q_proj"]) == {0.25}
    assert set(rows["k_proj"]) == {0.0}
    assert set(rows["v_proj"]) == {0.75}
    assert proposals["50%"]["dropped"] == "50.0%"


@pytest.mark.parametrize(("change", "words"), [
    (lambda scan: scan.pop("matrices"), "is no scan"),
    (lambda scan: scan["matrices"].clear(), "matrices should be at least one"),
    (lambda scan: scan["matrices"][0].update(block=99), r"matrices\[0\].block should be one of the model's"),
    (lambda scan: scan["matrices"][1]["errors"].pop("70%"), r"matrices\[1\].errors should be measured at 70%, too"),
    (lambda scan: scan["matrices"][1]["errors"].update(lots=0.5), "sparsity 'lots' is not a pattern"),
    (lambda scan: scan["matrices"][0].update(nats=-1), "is no whole scan: Expected"),
    (lambda scan: scan["model"].pop("name"), "model.name is missing"),
    (lambda scan: scan["calibration"].update(samples="many"), "calibration.samples should be a whole number"),
])  # fmt: skip
def test_a_damaged_scan_is_one_line(change, words: str, scanned: Path, tmp_path: Path) -> None:
    scan = json.loads((scanned / "scan.json").read_text())
    change(scan)
    (tmp_path / "scan.json").write_text(json.dumps(scan))
    with pytest.raises(InputError, match=words):
        llmprune.report(tmp_path / "scan.json", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_scan_stands_alone(scanned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a scan, which has a page of its own"):
        llmprune.report([scanned, tmp_path], tmp_path / "page.html")
    with pytest.raises(InputError, match=r"end it with \.html"):
        llmprune.report(scanned, scanned / "scan.json", overwrite=True)


@pytest.mark.skipif(BINARY is None, reason="needs Chromium")
def test_it_works_in_a_browser(scanned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    scan = json.loads((scanned / "scan.json").read_text())
    scan["model"]["name"] = "<b>bold</b>"
    (folder / "scan.json").write_text(json.dumps(scan))
    for file in scanned.glob("allocation-*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    page_of(folder, tmp_path)
    with tab(tmp_path) as page:
        page.open(tmp_path / "page.html", width=390)
        assert page.run("document.querySelector('h1').textContent") == "<b>bold</b>, scanned"
        assert page.run("document.querySelectorAll('figure svg').length") == 6
        assert page.run("document.documentElement.scrollWidth") <= 390
        page.run("document.querySelectorAll('th button')[2].click()")
        assert page.run("document.querySelector('th[aria-sort=ascending]').textContent").startswith("nats")
        assert not page.told("Runtime.exceptionThrown", "Log.entryAdded")
