"""Documentation text that every Python carries: the demo's training, calibration and evaluation splits.

Documents are the help topics of `pydoc_data.topics`, the docstrings of the standard library's Python sources (read
with `ast`, nothing is imported) and those of the built-in C modules. A hash of a document's *name* puts it in one
split for good, so that a split means the same on every Python version; the text itself is the user's own
interpreter's. Leaves out tests, tkinter and idlelib, which not every installation has.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from llmprune.base.errors import InputError

Split = Literal["train", "calibration", "evaluation"]

_LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "pydoc_data",
                       "site-packages", "dist-packages", "__pycache__"})  # fmt: skip
_HELD_OUT: tuple[Split, ...] = ("calibration", "evaluation")
_PARAGRAPH = "\n\n"
_SHORTEST = 40  # characters: a shorter docstring ("Return self<value.") says nothing


def split_of(name: str) -> Split:
    """The split that the document called `name` belongs to: 12% evaluation, 20% calibration, the rest train."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "evaluation" if bucket < 12 else "calibration" if bucket < 32 else "train"


def documents(split: Split) -> list[str]:
    """The documents of one split, in name order, without repeated docstrings.

    Raises:
        InputError: this interpreter carries no documentation.
    """
    return list(_documents(split))


def training() -> list[str]:
    """The train split, without any paragraph that the other splits have, too: what a model may be trained on.

    Raises:
        InputError: this interpreter carries no documentation.
    """
    held_out = {p for split in _HELD_OUT for text in documents(split) for p in text.split(_PARAGRAPH)}
    kept = (
        _PARAGRAPH.join(p for p in text.split(_PARAGRAPH) if len(p) < _SHORTEST or p not in held_out)
        for text in documents("train")
    )
    return [text for text in kept if text]


@functools.cache
def _documents(split: Split) -> tuple[str, ...]:
    """Once a process, as reading them takes a second: a model and its baseline are evaluated on the same, and so are cells."""
    seen: set[str] = set()
    texts = [_PARAGRAPH.join(_first_seen(parts, seen)) for _, parts in sorted(_pieces(split))]
    texts = [text for text in texts if text]
    if not texts:
        raise InputError(f"this Python ({sys.prefix}) carries no documentation to read; pass a text file instead")
    return tuple(texts)


def _pieces(split: Split) -> Iterator[tuple[str, list[str]]]:
    yield from _topics(split)
    yield from _source_docstrings(split)
    yield from _builtin_docstrings(split)


def _topics(split: Split) -> Iterator[tuple[str, list[str]]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in topics.items():
        if split_of(f"topic:{name}") == split:
            yield f"topic:{name}", [text.strip()]


def _source_docstrings(split: Split) -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in modules(split):
        yield ".".join(path.with_suffix("").parts), list(_docstrings(root / path))


def modules(split: Split) -> Iterator[Path]:
    """The standard library's Python sources of one split, relative to its folder."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root)
        parts = own.with_suffix("").parts
        if not _LEFT_OUT & set(parts) and split_of(".".join(parts)) == split:
            yield own


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # lib2to3-style fixtures of other Pythons
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text.strip()


def _builtin_docstrings(split: Split) -> Iterator[tuple[str, list[str]]]:
    for name in sorted(sys.builtin_module_names):
        if not name.startswith("__") and split_of(f"builtin:{name}") == split:
            module = importlib.import_module(name)
            yield f"builtin:{name}", list(_member_docstrings(module))


def _member_docstrings(owner: object) -> Iterator[str]:
    for _, member in sorted(vars(owner).items()):
        text = getattr(member, "__doc__", None)
        if isinstance(text, str) and text:
            yield inspect.cleandoc(text)
        if inspect.isclass(member) and not inspect.isclass(owner):
            yield from _member_docstrings(member)


def _first_seen(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    for text in texts:
        if len(text) >= _SHORTEST and text not in seen:
            seen.add(text)
            yield text
