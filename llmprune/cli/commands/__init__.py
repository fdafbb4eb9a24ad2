"""The words of the command, one file each. A file `name.py` here *is* `llmprune name`: see `base.Command`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.base.plugins import Plugins

if TYPE_CHECKING:
    from llmprune.cli.commands.base import Command

COMMANDS: Plugins[Command] = Plugins(__name__, "command")
DEFAULT = "prune"  # what is meant where no command is named
