"""The push that a run ends with, where one is asked for."""

from __future__ import annotations

from pathlib import Path

from llmprune.base.errors import InputError
from llmprune.base.words import command_line
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.output import hub


def check_push(config: PruneConfig, *, first: bool) -> None:
    """Refuse a push that cannot go well before the work, not after it."""
    repository = config.push_to_hub
    if repository is None:
        return
    if config.output is None:
        raise InputError(f"push_to_hub {repository} pushes the output folder: name one")
    if first:
        hub.check_ready(repository)


def push_output(config: PruneConfig, progress: Progress, output: Path | None) -> None:
    """Push the output folder, where that is asked for; it is complete, whatever comes of that."""
    repository = config.push_to_hub
    if repository is None or output is None:
        return
    try:
        progress.note(f"pushed: {hub.push(output, repository, tell=progress.note)}")
    except InputError as error:
        later = command_line("llmprune", "push", output, repository)
        raise type(error)(f"{error}; {output} is complete, and `{later}` pushes it later") from None
