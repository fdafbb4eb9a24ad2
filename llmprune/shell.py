"""What can be pasted as it is printed: command lines, and texts in Python code, whatever is in a name."""

from __future__ import annotations

import json
import shlex
from pathlib import Path


def command_line(*words: str | Path) -> str:
    """The words as a POSIX shell reads them. A path that begins with a dash gets `./` before it: else it would be an option."""
    return shlex.join(f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words)


def literal(text: str | Path) -> str:
    """The text as Python reads it."""
    return json.dumps(str(text), ensure_ascii=False)
