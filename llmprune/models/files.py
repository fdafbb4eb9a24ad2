"""What the files of a model's folder are called, and JSON read from one. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmprune.errors import InputError, reason

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = "packed.json"  # what a folder of packed 2:4 matrices holds instead


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: it cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {reason(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value
