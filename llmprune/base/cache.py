"""What was measured on this machine, kept in the user's cache folder. A cache that cannot be read or written is no error."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_file(name: str) -> Path | None:
    """Where the table called `name`, any text, is kept; None where the user has no home folder."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "llmprune" / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"


def recall(path: Path | None) -> dict[str, Any]:
    """The table in `path`; empty where there is none that can be read."""
    try:
        stored = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def remember(path: Path | None, table: Mapping[str, Any]) -> None:
    """Write the table, whole or not at all."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
            json.dump(table, stream, indent=1, sort_keys=True)
        Path(stream.name).replace(path)
    except OSError:
        pass
