"""The package's rooms: what each may import, how deep they stand, and that nothing runs in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

import llmprune
from llmprune.solvers import METHODS

ROOT = Path(llmprune.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
ENTRIES, LEVELS, LONGEST = 16, 11, 300  # at most: at the top of the package, of rooms above each other, lines of a file

# who may import whom, from the ground up: docs/architecture.md says what each is for
ALLOWED: dict[str, set[str]] = {
    "base": set(),
    "numerics": {"base"},
    "models": {"base", "numerics"},
    "data": {"base"},
    "solvers": {"base", "numerics"},
    "stream": {"base", "models", "data"},
    "formats": {"base", "numerics", "models"},
    "cost": {"base", "models"},
    "job": {"base", "numerics", "data", "solvers"},
    "measure": {"base", "models", "data", "stream", "formats", "cost", "job"},
    "output": {"base", "numerics", "models", "data", "formats", "cost", "job"},
    "reports": {"base", "numerics", "models", "formats", "cost", "job", "output"},
    "steps": {"base", "models", "data", "stream", "job", "output"},
    "steps/recover": {"base", "models", "data", "stream", "job", "measure", "output", "steps"},
    "steps/weights": {
        *("base", "numerics", "models", "data", "solvers", "stream", "formats", "cost", "job", "measure", "output", "steps"),
    },
    "steps/quantise": {
        *("base", "numerics", "models", "data", "formats", "stream", "job", "output", "steps", "steps/weights"),
    },
    "steps/channels": {"base", "numerics", "models", "data", "stream", "job", "output", "steps", "steps/weights"},
    "steps/structured": {
        *("base", "numerics", "models", "data", "stream", "cost", "job", "measure", "output"),
        *("steps", "steps/weights"),
    },
    "runs": {
        *("base", "numerics", "models", "data", "solvers", "stream", "formats", "cost", "job", "measure", "output", "reports"),
        *("steps", "steps/weights", "steps/structured", "steps/recover", "steps/quantise", "steps/channels"),
    },
    "api": {"formats", "measure", "output", "reports", "runs"},
    "cli": {
        *("base", "models", "formats", "solvers", "cost", "job", "measure", "output", "reports", "runs"),
        *("steps/structured", "steps/weights", "steps/quantise"),
    },
    "__init__": {"base", "api"},
    "__main__": {"cli"},
}  # fmt: skip


def room(path: Path) -> str:
    """The room of a module: its folder at the top, one further down in `steps`, or the file itself."""
    parts = path.with_suffix("").parts
    inside = parts[0] == "steps" and len(parts) > 2
    return "/".join(parts[: 2 if inside else 1])


@cache
def imports(path: Path) -> set[Path]:
    """The modules of llmprune that a module imports, at its top or inside functions, for types only or not."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llmprune":
            inside = Path(*node.module.split(".")[1:])
            found |= {_module(inside / alias.name) or _module(inside) for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {_module(Path(*a.name.split(".")[1:])) for a in node.names if a.name.startswith("llmprune.")}
    return {one for one in found if one is not None} - {path}


def _module(path: Path) -> Path | None:
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one in MODULES), None)


def circle(graph: Mapping[object, set]) -> list[object]:
    """Some of `graph` that lead back to themselves, in order; nothing where none do."""
    done: set[object] = set()

    def walk(node: object, path: tuple[object, ...]) -> list[object]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        found = next((found for to in sorted(graph[node], key=str) if (found := walk(to, (*path, node)))), [])
        done.add(node)
        return found

    return next((found for node in graph if (found := walk(node, ()))), [])


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_room_imports_what_it_may(path: Path) -> None:
    foreign = {room(one) for one in imports(path)} - {room(path)}
    assert foreign <= ALLOWED[room(path)]


def test_every_room_is_on_the_list_and_every_permit_is_used() -> None:
    used: dict[str, set[str]] = {}
    for path in MODULES:
        used.setdefault(room(path), set()).update({room(one) for one in imports(path)} - {room(path)})
    assert used == ALLOWED


def test_no_circle_of_modules_and_few_levels_of_rooms() -> None:
    assert circle({path: imports(path) for path in MODULES}) == []
    assert circle(ALLOWED) == []
    level: dict[str, int] = {}
    for name in ALLOWED:  # which stands above all that it imports
        assert ALLOWED[name] <= level.keys(), f"{name} stands below what it imports"
        level[name] = 1 + max((level[one] for one in ALLOWED[name]), default=0)
    assert max(level.values()) <= LEVELS


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_few_entries_at_the_top_and_no_long_file() -> None:
    top = {path.parts[0] for path in MODULES} - {"__init__.py", "__main__.py"}
    assert len(top) <= ENTRIES
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in MODULES}
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}


def external(path: Path) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in ("solvers", "numerics")], ids=str)
def test_numerics_know_no_model(path: Path) -> None:
    assert not external(path) & {"transformers", "accelerate", "safetensors", "datasets", "huggingface_hub"}


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in ("stream", "steps/weights")], ids=str)
def test_engine_names_no_method(path: Path) -> None:
    """Neither does the step that prunes weights, but for what tells a user to try another."""
    code = re.sub(r"try --method \w+", "", (ROOT / path).read_text().lower())
    words = set(re.findall(r"[a-z0-9]+", code))
    assert words
    assert not words & set(METHODS.names())
