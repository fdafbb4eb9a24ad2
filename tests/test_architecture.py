"""Imports go one way, and only the command's own parts are loaded for help."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llmprune
from llmprune import solvers

ROOT = Path(llmprune.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

# who may import whom, from the ground up; `errors`, `words` and `__init__` may be imported by all
ALLOWED = {
    "notation": set(),
    "patterns": {"notation"},
    "linalg": set(),
    "config": {"notation"},
    "hardware": set(),
    "demo": set(),
    "shell": set(),
    "ranks": set(),
    "clock": {"hardware"},
    "stats": {"linalg"},
    "kernels": {"hardware", "kernels"},
    "sparse": {"kernels", "models", "sparse", "stream"},
    "solvers": {"patterns", "stats", "linalg", "solvers"},
    "models": {"models"},
    "data": {"demo"},
    "texts": {"config", "data"},
    "stream": {"models", "data", "hardware", "stream"},
    "evaluate": {"data", "hardware", "kernels", "ranks", "stream"},
    "plan": {"models", "patterns"},
    "report": {"config", "data", "evaluate", "models", "patterns", "report", "shell", "sparse", "stream"},
    "recipes": {"config"},
    "asked": {"config", "models", "recipes", "solvers", "stream", "structured"},
    "reconstruct": {"models", "ranks", "report", "stream"},
    "solving": {"clock", "linalg", "models", "patterns", "ranks", "recipes", "report", "solvers", "stats"},
    "pruner": {
        "clock",
        "models",
        "patterns",
        "ranks",
        "recipes",
        "reconstruct",
        "report",
        "solvers",
        "solving",
        "stats",
        "stream",
    },
    "integrity": {"models", "patterns", "report", "sparse", "stream"},
    "hub": {"integrity", "models", "report", "sparse", "stream"},
    "scouting": None,
    "sizing": None,
    "budget": None,
    "structured": {
        "clock",
        "data",
        "linalg",
        "models",
        "notation",
        "ranks",
        "report",
        "solving",
        "stats",
        "stream",
        "structured",
    },
    "preflight": {"hardware", "models", "recipes", "reconstruct", "solvers", "stats", "stream", "texts"},
    "run": None,
    "shrinking": None,
    "pipeline": None,
    "__main__": {"cli"},
    "bench": None,
    "evaluation": None,
    "comparison": None,
    "commands": None,
    "terminal": set(),
    "cli": {"asked", "commands", "terminal", "config", "recipes", "shell", "solvers", "structured", "pipeline", "report"},
}


def imports(path: Path) -> set[str]:
    """The parts of llmprune that a module imports, at its top or inside functions; type-only imports aside."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llmprune":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("llmprune.")}
    return found - {"errors", "words", "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    room = path.parts[0].removesuffix(".py")
    if room in ("__init__", "errors", "words"):
        return
    allowed = ALLOWED[room]
    assert allowed is None or imports(path) <= allowed


def external(path: Path) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parts[0] in ("solvers", "patterns.py", "linalg.py", "stats.py")], ids=str
)
def test_numerics_know_no_model(path: Path) -> None:
    assert not external(path) & {"transformers", "accelerate", "safetensors", "datasets", "huggingface_hub"}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] == "stream"], ids=str)
def test_engine_names_no_method(path: Path) -> None:
    words = set(re.findall(r"[a-z0-9]+", (ROOT / path).read_text().lower()))
    assert words
    assert not words & set(solvers.names())
