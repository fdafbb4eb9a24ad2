"""`llmprune`, or `llmprune prune`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llmprune.base.errors import user_path
from llmprune.base.words import command_line
from llmprune.cli.commands.base import Outcome, showing
from llmprune.cli.config_file import read_yaml
from llmprune.cli.terminal import Terminal, is_first
from llmprune.job.flags import flag
from llmprune.job.options import TARGETS, PruneConfig
from llmprune.solvers import METHODS
from llmprune.steps.quantise.rounding import ROUNDINGS
from llmprune.steps.structured.scores import SCORES
from llmprune.steps.weights.allocate import ALLOCATORS

SUMMARY = "prune a model after training, block by block"
EXAMPLE = "llmprune --model llama --sparsity 2:4"
NAMES: dict[str, Callable[[], list[str]]] = {
    "method": METHODS.names,
    "score": SCORES.names,
    "allocate": ALLOCATORS.names,
    "rounding": ROUNDINGS.names,
}  # what options name


def add(parser: argparse.ArgumentParser) -> None:
    """The fields of `PruneConfig`, and a file that has them."""
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a YAML file; flags win over it")
    add_fields(parser, dataclasses.fields(PruneConfig))


def add_fields(parser: argparse.ArgumentParser, fields: Iterable[dataclasses.Field[Any]]) -> None:
    """Flags for fields of `PruneConfig`."""
    for field in fields:
        name, text = flag(field.name), field.metadata["help"].replace("%(default)s", str(field.default))
        if field.name in NAMES:
            text += f": {', '.join(NAMES[field.name]())}"
        common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": field.name}
        if str(field.type).startswith("bool"):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **common)
        elif str(field.type).startswith("tuple"):
            parser.add_argument(name, nargs="+", action="extend", metavar=field.metadata["metavar"], **common)
        else:
            kind = next((kind for kind in (int, float) if str(field.type).startswith(kind.__name__)), str)
            parser.add_argument(name, type=kind, metavar=field.metadata["metavar"] or field.name[0].upper(), **common)


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    config = _configured(dict(options))
    from llmprune.runs.checks import check_folders, check_names, finished

    check_names(config)
    if (done := finished(config)) is not None:
        return _finished(*done, config.push_to_hub, terminal)
    check_folders(config)
    shown = showing(terminal)
    from llmprune.runs.prune import prune

    with shown as progress:
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        result = prune(values.pop("model"), progress=progress, **values)
    return Outcome({"output": result.output, **result.record.as_dict()} if is_first() else None)


def _configured(options: dict[str, Any]) -> PruneConfig:
    """From flags and, under them, a file."""
    path = options.pop("config", None)
    if path is not None:
        options = _under(options, _checked(read_yaml(user_path(path, "config")), path))
    return PruneConfig.create({"output": "auto"} | options)


def _under(flags: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A file's values with the flags over them; --method also wins over the file's quality, and the other way round."""
    for named, other in (("method", "quality"), ("quality", "method")):
        if named in flags:
            values.pop(other, None)
    return values | flags


def _checked(values: dict[str, Any], path: str) -> dict[str, Any]:
    """A file's options, checked on their own so that an error names the file, as if flags said what else they need."""
    amounts = {} if any(name in values for name in TARGETS) else {"neurons": "1", "layers": "1"}
    PruneConfig.create({"model": "-", "output": "-", "sparsity": "0.5", "bits": 8, **amounts, **values}, where=path)
    return values


def _finished(output: Path, record: dict[str, Any], push_to_hub: str | None, terminal: Terminal) -> Outcome:
    """Say that there is nothing to do; push what is there, where that is asked for."""
    if not is_first():
        return Outcome(None)
    check = command_line("llmprune", "verify", output)
    terminal.say(
        f"{output} is complete: an earlier run of this command wrote it; `{check}` checks it, --overwrite makes it anew"
    )
    if push_to_hub is not None:
        from llmprune.cli.commands import push

        push.run({"folder": str(output), "repo_id": push_to_hub}, terminal)
    return Outcome({"output": output, **record})
