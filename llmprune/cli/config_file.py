"""Options from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from llmprune.base.errors import InputError, reason


def read_yaml(path: Path) -> dict[str, Any]:
    """Options from a YAML file.

    Raises:
        InputError: it cannot be read, is not YAML or not a mapping.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _NoDuplicates)
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"config {path} is not YAML: {reason(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"config {path} must be a mapping of option names to values")
    options = {str(name).replace("-", "_"): item for name, item in value.items()}
    if len(options) < len(value):
        raise InputError(f"config {path} gives an option twice, once with - and once with _")
    return options


class _NoDuplicates(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{repeated[0]!r} is given twice")
        return super().construct_mapping(node, deep)
