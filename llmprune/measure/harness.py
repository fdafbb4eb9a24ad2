"""lm-eval's tasks on a model in memory, through lm-eval itself (EleutherAI, lm-evaluation-harness)."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.base.errors import InputError, MachineError, reason, unknown
from llmprune.data.documents import unreachable


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        error: its standard error, as lm-eval estimates it; None where it does not.
        size: how many documents it was measured on.
    """

    task: str
    metric: str
    value: float
    error: float | None
    size: int
    higher_is_better: bool
    fewshot: int


class Tasks:
    """Tasks that lm-eval knows by these names.

    Args:
        path: a folder of further task files, in lm-eval's own layout.

    Raises:
        InputError: lm-eval is not installed, the folder is none, or a name is unknown.
    """

    def __init__(self, names: Sequence[str], path: Path | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise InputError("tasks need lm-eval: pip install lm-eval") from None
        if path is not None and not path.is_dir():
            raise InputError(f"task path {path} is no folder")
        self.names = list(names)
        include = None if path is None else str(path)
        self._manager = TaskManager(include_path=include, include_defaults=False)
        if set(names) - set(self._manager.all_tasks):  # its own take seconds to list
            self._manager = TaskManager(include_path=include)
        for name in names:
            if name not in self._manager.all_tasks:
                raise unknown("task", name, self._manager.all_tasks)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        limit: int | None,
        fewshot: int | None,
        seed: int,
    ) -> list[TaskScore]:
        """Every metric of every task.

        Raises:
            InputError: a task's data cannot be loaded, or it cannot be run.
            MachineError: its data cannot be fetched.
        """
        import lm_eval

        with _quiet():
            harness = _model_class()(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            try:
                found = lm_eval.simple_evaluate(
                    model=harness, tasks=self.names, task_manager=self._manager, limit=limit, num_fewshot=fewshot,
                    random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
                    log_samples=False,
                )  # fmt: skip
            except (HTTPError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
                kind = MachineError if unreachable(error) else InputError
                raise kind(f"lm-eval cannot run {', '.join(self.names)}: {reason(error)}") from None
        assert found is not None
        return list(_scores(found))


def _scores(found: Any) -> Iterator[TaskScore]:
    for task, results in found["results"].items():
        sizes = found.get("n-samples", {}).get(task)
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = results.get(f"{metric}_stderr,{kind}")
            higher = found.get("higher_is_better", {}).get(task, {}).get(metric, True)
            yield TaskScore(
                task,
                metric if kind == "none" else f"{metric} ({kind})",
                float(value),
                float(error) if isinstance(error, (int, float)) else None,
                int(sizes["effective"]) if sizes else 0,
                bool(higher),
                int(found.get("n-shot", {}).get(task) or 0),
            )


def _model_class() -> Any:
    """lm-eval's model, whose bars are for terminals only: it asks for them whatever tqdm's own settings say."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or _away())

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm or _away(), **options)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or _away())

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or _away())

    return Model


def _away() -> bool:
    """Whether nobody watches."""
    return not sys.stderr.isatty()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log and prints out of what the user reads, and what git says where this is no repository."""
    from lm_eval import evaluator

    log, level, commit = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level, evaluator.get_git_commit_hash
    log.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        log.setLevel(level)
        evaluator.get_git_commit_hash = commit
