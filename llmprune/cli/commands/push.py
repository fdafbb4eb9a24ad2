"""`llmprune push`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "verify a folder that llmprune wrote and push it to the Hub, in one commit"
EXAMPLE = "llmprune push llama-2of4-balanced me/llama-2of4 --private"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="dense or packed")
    parser.add_argument("repo_id", metavar="USER/NAME", help="the repository; created if it is not there")
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch; created if it is not there (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    from llmprune.output.hub import push

    url = push(**options, tell=terminal.say)
    terminal.say(f"pushed {options['folder']}: {url}")
    return Outcome({"folder": options["folder"], "repo_id": options["repo_id"], "url": url})
