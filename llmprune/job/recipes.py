"""What a run does to each block: a method asked for by name, as published, or a preset of measured quality."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmprune.base.errors import InputError, unknown
from llmprune.base.notation import DEALT_OUT, read_sparsity
from llmprune.job.channels import PERMUTED, ROTATED
from llmprune.job.options import PruneConfig

PASSES = 3


@dataclass(frozen=True, slots=True)
class Recipe:
    """How blocks are pruned.

    Attributes:
        name: what to call the result by: the method's name, or the preset's.
        method: the solver.
        refit: solve least squares on the mask that the method leaves.
        target: `dense`: imitate W on the pruned model's inputs; `corrected`: imitate what the dense model puts out.
        reconstruct: fit each block, once pruned, to the dense block's output.
        true_sequential: solve each stage of a block on inputs that the stages before it, already pruned, put out; else all
            of them from one pass.
        rotate: before, rotate channels so that a mask costs less.
        permute: then, put them in an order in which an N:M mask costs less.
        passes: over the calibration windows, where blocks are reconstructed.
    """

    name: str
    method: str
    refit: bool = False
    target: str = "dense"
    reconstruct: bool = False
    true_sequential: bool = True
    rotate: bool = False
    permute: bool = False
    passes: int = PASSES

    @property
    def changes(self) -> tuple[str, ...]:
        """What becomes of channels before, in order."""
        return tuple(kind for kind, wanted in ((ROTATED, self.rotate), (PERMUTED, self.permute)) if wanted)

    def __str__(self) -> str:
        """In words, such as `balanced: alps + refit + corrected target`."""
        steps = [f"{change} channels" for change in self.changes] + [self.method]
        steps += ["refit"] if self.refit else []
        steps += ["corrected target"] if self.target == "corrected" else []
        longer = f" of {self.passes} passes" if self.passes != PASSES else ""
        steps += [f"block reconstruction{longer}"] if self.reconstruct else []
        words = " + ".join(steps)
        return words if self.name == self.method else f"{self.name}: {words}"


TARGETS = ("dense", "corrected")
QUALITIES = {
    "fast": Recipe("fast", "annealed", refit=True),
    "balanced": Recipe("balanced", "annealed", refit=True, target="corrected"),
    "best": Recipe("best", "annealed", refit=True, target="corrected", reconstruct=True),
    "max": Recipe(
        "max", "annealed", refit=True, target="corrected", reconstruct=True, rotate=True, permute=True, passes=PASSES + 1
    ),
}
SCANNING = Recipe("scan", "sparsegpt", true_sequential=False)  # which errors a scan compares: one sweep a level is quick


def choose_recipe(config: PruneConfig) -> Recipe:
    """The recipe that `config` asks for; its own `refit`, `target` and `reconstruct` win over the preset's.

    Raises:
        InputError: a name is unknown, or both a method and a preset are named.
    """
    if config.method is not None and config.quality is not None:
        raise InputError(f"method {config.method} and quality {config.quality} exclude each other: name one")
    if config.method is not None:
        recipe = Recipe(config.method, config.method)
    else:
        quality = config.quality or "balanced"
        if quality not in QUALITIES:
            raise unknown("quality", quality, QUALITIES)
        recipe = QUALITIES[quality]
    if config.target is not None and config.target not in TARGETS:
        raise unknown("target", config.target, TARGETS)
    if config.rotate and config.scan is not None:
        raise InputError("scan is of the dense model as it was, and rotated matrices lose otherwise: leave it out")
    rotatable = config.sparsity is not None and config.scan is None
    return replace(
        recipe,
        refit=recipe.refit if config.refit is None else config.refit,
        target=recipe.target if config.target is None else config.target,
        reconstruct=recipe.reconstruct if config.reconstruct is None else config.reconstruct,
        rotate=recipe.rotate and rotatable if config.rotate is None else config.rotate,
        permute=recipe.permute and _in_fours(config) if config.permute is None else config.permute,
    )


def _in_fours(config: PruneConfig) -> bool:
    """Whether the pattern is of groups that channels can be permuted for."""
    asked = read_sparsity(config.turns[-1]) if config.turns else 0.0
    return isinstance(asked, tuple) and asked[1] <= DEALT_OUT
