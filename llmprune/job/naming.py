"""What the output folder is called where the user does not say."""

from __future__ import annotations

from pathlib import Path

from llmprune.base.errors import user_path
from llmprune.job.options import PruneConfig
from llmprune.job.recipes import choose_recipe


def output_folder(config: PruneConfig, model: str) -> Path | None:
    """The folder to write; `auto` names it after the model, what is removed, the pattern and the method."""
    if config.output != "auto":
        return None if config.output is None else user_path(config.output, "output")
    asked = {what: getattr(config, what) for what in ("heads", "neurons", "layers")}
    parts = [f"{what}{amount}" for what, amount in asked.items() if amount]
    parts += [f"to{config.target_params}"] if config.target_params else []
    parts += [config.sparsity] if config.sparsity else []
    parts += [config.allocate] if config.allocate != "uniform" else []
    parts += [Path(config.allocation).stem] if config.allocation else []
    parts += [choose_recipe(config).name] if config.sparse else []
    return Path("-".join([model, *parts]).replace(":", "of").replace("%", "pct"))
