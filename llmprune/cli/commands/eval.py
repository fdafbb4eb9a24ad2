"""`llmprune eval`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from llmprune.base.errors import InputError
from llmprune.base.notation import AUTO_DTYPE
from llmprune.cli.commands.base import Outcome
from llmprune.cli.terminal import Terminal

SUMMARY = "measure perplexity and lm-eval's tasks, alone or beside the dense model"
EXAMPLE = "llmprune eval llama-2of4-balanced --baseline llama --task-path eval/tasks --tasks pydoc_summary"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a dense, pruned or packed folder, a bundled name, or a Hub id")
    parser.add_argument("--texts", nargs="+", metavar="TEXT", help="for token perplexity (default: pydoc, without --tasks)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of lm-eval, such as arc_easy hellaswag (commas do too)")
    parser.add_argument("--task-path", metavar="DIR", help="a folder of further task files, in lm-eval's layout")
    parser.add_argument("--baseline", metavar="MODEL", help="put this model's numbers beside")
    parser.add_argument("--limit", type=int, metavar="N", help="documents a task (default: all)")
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before each (default: the task's own)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="for tasks (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=2048, metavar="N", help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, metavar="N", help="at most, for perplexity (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of examples and draws (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help=f"auto is {AUTO_DTYPE}")


def run(options: Mapping[str, Any], terminal: Terminal) -> Outcome:
    from llmprune.measure.evaluate import evaluate, show

    rest = {name: value for name, value in options.items() if name != "model"}
    if "tasks" in rest:
        rest["tasks"] = [name for word in rest["tasks"] for name in word.split(",") if name]
        if not rest["tasks"]:
            raise InputError("--tasks names none: give tasks of lm-eval, such as arc_easy")
    found = evaluate(options["model"], **rest, tell=terminal.say)
    show(found, terminal.console)
    return Outcome(found.as_dict())
