"""Options as the words of a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmprune.job.fields import Options
from llmprune.job.options import PruneConfig


def flag(name: str) -> str:
    """Of the option `name`; what is a word of Python has `_` after it in names, as `for_` of `--for`."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def as_flags(options: Mapping[str, Any], kind: type[Options] = PruneConfig) -> list[str]:
    """The command line's words for options of `kind` that are not at their defaults."""
    words = []
    for field_ in dataclasses.fields(kind):
        name, value = flag(field_.name), options.get(field_.name, field_.default)
        if value is None or value == field_.default or (field_.default == () and not value):
            continue
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        else:
            texts = list(map(str, value)) if isinstance(value, (list, tuple)) else [str(value)]
            odd = any(text.startswith("-") for text in texts)  # which would be read as flags
            words += [f"{name}={text}" for text in texts] if odd else [name, *texts]
    return words
