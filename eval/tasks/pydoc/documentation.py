"""The data of the tasks here: documentation that the bundled model never saw, read from the Python that runs lm-eval.

Deterministic for one version of Python. Only documents of the evaluation split are used, which neither training nor
calibration has; see `llmprune/demo/text.py`.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmprune.data.pydoc import documents, modules

_CHOICES, _QUESTIONS = 4, 200
_CONTEXT, _CONTINUATION = 40, 12  # words
_CHARACTERS = 2000


def passages(**_: Any) -> dict[str, Dataset]:
    """The first 2,000 characters of every document."""
    return {"test": Dataset.from_list([{"text": text[:_CHARACTERS]} for text in documents("evaluation")])}


def continuations(**_: Any) -> dict[str, Dataset]:
    """40 words, and 12 that may follow them: the next ones, or those of three other places."""
    generator = random.Random(0)
    size = _CONTEXT + _CONTINUATION
    texts = [text.split() for text in documents("evaluation")]
    found = [words[i : i + size] for words in texts for i in range(0, len(words) - size, size)]
    chosen = generator.sample(found, min(_QUESTIONS, len(found)))
    rows = []
    for number, words in enumerate(chosen):
        others = generator.sample([other for i, other in enumerate(chosen) if i != number], _CHOICES - 1)
        choices = [" ".join(one[_CONTEXT:]) for one in (words, *others)]
        rows.append(_shuffled(" ".join(words[:_CONTEXT]), choices, generator))
    return {"test": Dataset.from_list(rows)}


def summaries(**_: Any) -> dict[str, Dataset]:
    """A function's head, and summary lines: its own, or those of three other functions, of its own module where it has them."""
    generator = random.Random(0)
    functions = [(path, head, line) for path in modules("evaluation") for head, line in _functions(path)]
    lines = [line for _, _, line in functions]
    own = [(path, head, line) for path, head, line in functions if lines.count(line) == 1]
    rows = []
    for path, head, line in generator.sample(own, min(_QUESTIONS, len(own))):
        near = [other for where, _, other in own if where == path and other != line]
        far = [other for where, _, other in own if where != path]
        few = generator.sample(near, min(len(near), _CHOICES - 1))
        others = few + generator.sample(far, _CHOICES - 1 - len(few))
        rows.append(_shuffled(head, [line, *others], generator))
    return {"test": Dataset.from_list(rows)}


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    """Heads and summary lines of a module's functions that take arguments."""
    for node in ast.walk(ast.parse((Path(sysconfig.get_path("stdlib")) / path).read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.args.args:
            summary = (ast.get_docstring(node) or "").strip().split("\n")[0]
            if len(summary) >= 20:
                yield f'def {node.name}({ast.unparse(node.args)}):\n    """', summary


def _shuffled(context: str, choices: list[str], generator: random.Random) -> dict[str, Any]:
    """The first choice is right."""
    order = generator.sample(range(len(choices)), len(choices))
    return {"context": context, "choices": [choices[i] for i in order], "label": order.index(0)}
