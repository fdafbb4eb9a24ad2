"""Scripts that complete the command in a shell."""

from __future__ import annotations

import argparse

from llmprune.base.errors import unknown
from llmprune.base.notation import DTYPES
from llmprune.cli.commands import COMMANDS
from llmprune.cli.commands.prune import NAMES
from llmprune.cli.parser import declare, main_parser, others
from llmprune.job.fields import PLACES
from llmprune.job.options import LAYER_SCORES, MEANS, PHASES
from llmprune.job.recipes import QUALITIES, TARGETS
from llmprune.job.recovery import SHARES, TRAINED

_CHOICES = {  # what is offered besides `NAMES`
    "quality": tuple(QUALITIES),
    "target": TARGETS,
    "dtype": DTYPES,
    "activations": PLACES,
    "layer_score": LAYER_SCORES,
    "device": ("auto", "cpu", "cuda"),
    "for_": PHASES,
    "by": MEANS,
    "train": TRAINED,
    "loss": tuple(SHARES),
}
_PATHS = {  # where files are offered
    *("model", "models", "folder", "runs", "baseline", "output", "config", "json", "bench", "task_path"),
    *("calibration", "eval_text", "text", "texts", "scan", "allocation", "teacher"),
}


def completion(shell: str) -> str:
    """A script for `shell` that completes the command, its options, names and files.

    Raises:
        InputError: there is none for it.
    """
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise unknown("shell", shell, shtab.SUPPORTED_SHELLS)
    whole = main_parser()
    words = whole.add_subparsers()
    parsers: list[argparse.ArgumentParser] = [whole]
    for name in others():
        parsers.append(words.add_parser(name, help=COMMANDS.get(name).SUMMARY))
        declare(name, parsers[-1])
    for action in (action for parser in parsers for action in parser._actions):
        if action.dest in _PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in NAMES:
            action.choices = NAMES[action.dest]()
        else:
            action.choices = _CHOICES.get(action.dest, action.choices)
    return shtab.complete(whole, shell)
