"""One job: what is asked, and who works on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from llmprune.base.clock import Clock
from llmprune.base.errors import user_path
from llmprune.base.notation import ALLOWANCES
from llmprune.base.processes import Ranks
from llmprune.data.windows import Given
from llmprune.job.allocation import read_allocation
from llmprune.job.naming import output_folder
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.job.recipes import Recipe, choose_recipe
from llmprune.job.scan import Allocation, Scan
from llmprune.numerics.patterns import Pattern, parse
from llmprune.solvers import METHODS

_WINDOWS, _TOKENS = 8, 4096  # run at once where nobody says otherwise: so many windows; on a CPU of so many tokens at most


@dataclass(slots=True)
class Job:
    """What was asked. Method, pattern and files are looked up at once, so that a mistake costs no work.

    Attributes:
        pattern: where all matrices together have one.
        allocation: the user's own patterns by matrix.
        scan: what an earlier scan has measured.
    """

    config: PruneConfig
    given: Given | None
    progress: Progress
    ranks: Ranks
    clock: Clock = field(default_factory=Clock)
    recipe: Recipe = field(init=False)
    pattern: Pattern | None = field(init=False)
    allocation: Allocation | None = field(init=False)
    scan: Scan | None = field(init=False)

    def __post_init__(self) -> None:
        recipe, asked = choose_recipe(self.config), self.config.true_sequential
        published = METHODS.get(recipe.method).true_sequential
        self.recipe = replace(recipe, true_sequential=published if asked is None else asked)
        config = self.config
        self.pattern = parse(config.sparsity) if config.sparsity is not None else None
        self.allocation = read_allocation(user_path(config.allocation, "allocation")) if config.allocation else None
        self.scan = Scan.load(user_path(config.scan, "scan")) if config.scan else None

    def method(self) -> str:
        """In words."""
        config, steps = self.config, []
        if config.layers is not None:
            steps.append(f"layers by {config.layer_score}")
        structure = config.budgets if config.by == "structure" else {}
        if structure:
            named = [counted.noun for name, counted in ALLOWANCES.items() if name in structure]
            named += ["time"] if config.target_speedup else []
            steps.append(f"a budget of {' and '.join(named)} by second order")
        if config.heads is not None or config.neurons is not None or structure:
            fitted = "" if config.refit is False else f" + least squares, {self.recipe.target} target"
            steps.append(f"{config.score}{fitted}{', by layer' if config.per_layer else ''}")
        if config.by == "weights":
            steps.append(f"a budget of {' and '.join(ALLOWANCES[name].noun for name in config.budgets)} by sensitivity")
        steps += [str(self.recipe)] if config.sparse else []
        return ", then ".join(steps + ([f"{config.rounding} rounding to {config.bits} bits"] if config.bits else []))

    def batch(self, length: int, device: torch.device) -> int:
        """How many windows of `length` tokens this process runs at once.

        What is chosen here depends on nothing that is measured in the run: other batches add in another order, which gives
        other weights. On a CPU batches of 1024 to 4096 tokens were equally fast, and those of 16384 slower (docs/profile.md).
        """
        chosen = self.config.batch_size or (min(_WINDOWS, _TOKENS // length) if device.type == "cpu" else _WINDOWS)
        return max(chosen // self.ranks.size, 1)

    def output(self, model: str) -> Path | None:
        """See `output_folder`."""
        return output_folder(self.config, model)

    def quantise_only(self, output: Path) -> Job:
        """What is left of the job when weights have been pruned."""
        return Job(self.config.quantise_only(output), self.given, self.progress, self.ranks, self.clock)

    def weights_only(self, output: Path) -> Job:
        """What is left of the job when structure has been removed: the same clock and processes, weights to prune."""
        return Job(self.config.weights_only(output), self.given, self.progress, self.ranks, self.clock)
