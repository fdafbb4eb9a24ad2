"""The command that makes a run's result again, for its report and its model card."""

from __future__ import annotations

from llmprune.base.words import command_line
from llmprune.data.documents import GIVEN
from llmprune.job.flags import as_flags
from llmprune.job.record import RunRecord
from llmprune.job.recovery import RECOVERED, RecoverConfig

NO_COMMAND = (
    "It was made from Python, of a model in memory or with tokens of its own, so no command makes it again; "
    "llmprune.json holds the arguments."
)
_NOT_THE_RESULT = ("output", "overwrite", "restart", "push_to_hub", "activations")
_PRUNED = "pruned"  # a folder on the way


def again(record: RunRecord) -> str | None:
    """The command line that makes the same model; None where there is none, as NO_COMMAND says."""
    arguments, model, processes = record.arguments, record.model, record.compute["processes"]
    if arguments.get("calibration") == GIVEN or arguments["model"] == model["class"]:
        return None
    options = {name: value for name, value in arguments.items() if name not in _NOT_THE_RESULT}
    if model["hub_id"] and model["commit"]:
        options["model"] = f"{model['hub_id']}@{model['commit']}"
    start = ["torchrun", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    turns = len((arguments["sparsity"] or "").split(",")) if arguments.get("recover") else 0
    rounded = record.rounding.get("arguments")
    later = record.recoveries[turns:]  # of which the command does not speak
    commands = [command_line(*start, "llmprune", *as_flags(options), *(("--output", _PRUNED) if later or rounded else ()))]
    for number, told in enumerate(later):
        trained = {key: value for key, value in told["arguments"].items() if key not in ("model", *_NOT_THE_RESULT)}
        name = _PRUNED + number * RECOVERED  # as `recover` names what it writes
        commands.append(command_line("llmprune", "recover", name, *as_flags(trained, RecoverConfig)))
    if rounded:
        name = _PRUNED + len(later) * RECOVERED
        asked = {key: value for key, value in rounded.items() if key not in ("model", *_NOT_THE_RESULT)}
        commands.append(command_line("llmprune", "quantise", name, *as_flags(asked)))
    return " && ".join(commands)
