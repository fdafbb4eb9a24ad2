"""What was asked for, in words, and what the output folder is called where the user does not say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.base.errors import user_path
from llmprune.base.notation import ALLOWANCES, in_file_name
from llmprune.job.options import PruneConfig
from llmprune.job.recipes import choose_recipe

_BUDGETS = {"target_params": "to", "target_bytes": "bytes", "target_macs": "macs"}


def output_folder(config: PruneConfig, model: str) -> Path | None:
    """The folder to write; `auto` names it after the model, what is removed, the pattern and the method."""
    if config.output != "auto":
        return None if config.output is None else user_path(config.output, "output")
    asked = {what: getattr(config, what) for what in ("heads", "neurons", "layers")}
    parts = [f"{what}{amount}" for what, amount in asked.items() if amount]
    parts += [f"{what}{getattr(config, name)}" for name, what in _BUDGETS.items() if getattr(config, name)]
    parts += [f"{config.target_speedup}{config.for_}"] if config.target_speedup else []
    parts += config.turns
    parts += [config.allocate] if config.allocate != "uniform" else []
    parts += [Path(config.allocation).stem] if config.allocation else []
    parts += [config.by] if config.by != "structure" else []
    parts += [choose_recipe(config).name] if config.sparse else []
    parts += [f"int{config.bits}"] if config.bits else []
    parts += ["recovered"] if config.recover else []
    return Path("-".join([model, *map(in_file_name, parts)]))


def asked_text(arguments: Mapping[str, Any]) -> str:
    """What a run was asked for, in words; `arguments` are a record's, of any version."""
    given = {name: value for name, value in arguments.items() if value}
    parts = [f"{given[what]} fewer {what}" for what in ("heads", "neurons", "layers") if what in given]
    means = ", by pruning weights" if given.get("by") == "weights" else ""
    parts += [f"{given[name]} of its {counted.noun}{means}" for name, counted in ALLOWANCES.items() if name in given]
    if "target_speedup" in given:
        parts.append(f"{given['target_speedup']} the speed in {given['for_']}")
    spread = f" spread by {given['allocate']}" if given.get("allocate", "uniform") != "uniform" else ""
    *turns, last = given.get("sparsity", "").split(",")
    by = f" by way of {', '.join(turns)}" if turns else ""
    parts += [f"{last}{spread}{by}"] if last else []
    parts += ["a sparsity for each matrix"] if "allocation" in given else []
    return ", ".join(parts + ([f"{given['bits']} bits"] if "bits" in given else []))
