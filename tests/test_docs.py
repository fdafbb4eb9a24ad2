"""The documentation: links lead somewhere, numbers are those of the results, and what can run offline runs."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import forks
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "eval").rglob("*.md"))]
FENCED = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
REASON = re.compile(r"not run: .*\b(Hub|network|GPU|GPUs|port|browser|installs packages|test suite|excerpt)\b")


class Block(NamedTuple):
    language: str
    code: str
    mark: str | None  # the comment right above


def blocks(page: Path) -> list[Block]:
    found = FENCED.finditer(page.read_text(encoding="utf-8"))
    return [Block(b["language"], b["code"], b["mark"]) for b in found if b["language"] in ("bash", "python")]


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.mark is None or not block.mark.startswith("not run")]


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The headings' names, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = sum(name == plain or re.fullmatch(rf"{re.escape(plain)}-\d+", name) is not None for name in found)
        found.add(f"{plain}-{again}" if again else plain)
    return found


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(re.sub(r"`[^`]*`", "``", prose(page))):
        if re.match(r"\w+:", target):
            assert re.fullmatch(r"https?://[\w.-]+(/\S*)?", target), target
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        assert ROOT in (place, *place.parents), target
        assert not anchor or anchor in anchors(place), target


def test_the_readme_is_short_and_names_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert [name(page) for page in PAGES[1:] if f"({name(page)})" not in text] == []


def test_the_first_commands_are_those_that_ci_pastes() -> None:
    assert blocks(PAGES[0])[0].code == (
        "pip install -c constraints.txt . && llmprune --model llama --sparsity 2:4\n"
        "pip install -c constraints.txt '.[test]' && pytest\n"
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_does_not_run_says_why(page: Path) -> None:
    assert [mark for _, _, mark in blocks(page) if mark is not None and not REASON.match(mark)] == []


@functools.cache
def options() -> dict[str, set[str]]:
    """Of each command, and of `prune`, which has no word of its own."""
    words = [sys.executable, "-m", "llmprune", "--print-completion", "bash"]
    script = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^_shtab_llmprune_(?:(\w+)_)?option_strings=\((.*)\)$", script, re.MULTILINE)
    return {command or "prune": set(flags.split()) for command, flags in found}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_are_those_of_the_commands(page: Path) -> None:
    known = options()
    spans = [span.split() for span in re.findall(r"`([^`\n]+)`", prose(page))]
    lines = [re.split(" [#|] ", line)[0].split() for block in blocks(page) for line in block.code.splitlines()]
    for words in spans + lines:
        if words and words[0] == "llmprune":
            there = known[words[1]] if len(words) > 1 and words[1] in known else known["prune"]
        elif words and words[0].startswith("--"):
            there = set().union(*known.values())
        else:
            continue
        assert {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"} <= there, words


def test_numbers_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import docs_numbers

    assert docs_numbers.stale() == []


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name)
def test_examples_run(page: Path, python: list[str], tmp_path: Path) -> None:
    """In the order of the page, in one folder, in a checkout's place; `llmprune` is quicker, see `forks`."""
    command = [*python, "quick"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "eval").symlink_to(ROOT / "eval")
    shutil.copy(ROOT / "LICENSE", tmp_path / forks.TEXT)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    shim = tmp_path / "bin" / "llmprune"
    shim.write_text(f'#!/bin/sh\nexec {shlex.join([*command, "llmprune"])} "$@"\n')
    shim.chmod(0o755)
    for language, code, _ in runnable(page):
        file = tmp_path / f"block.{language}"
        file.write_text(code, encoding="utf-8")
        words = ["bash", "-euo", "pipefail"] if language == "bash" else [*command, "python"]
        environment = os.environ | {"PATH": path, "HOME": str(tmp_path)}
        done = subprocess.run(
            [*words, file], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}"
