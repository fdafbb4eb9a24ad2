"""`llmprune eval`: perplexity and lm-eval's tasks of a model, alone or beside the dense one that it was made from."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.base.errors import InputError, plain_errors, user_path
from llmprune.base.files import RECORD, read_json
from llmprune.base.hardware import pick_device, pick_dtype
from llmprune.base.notation import listed
from llmprune.base.words import count
from llmprune.data.windows import Windows, evaluation_windows
from llmprune.formats.loading import load
from llmprune.job.record import PERPLEXITY_OF, versions
from llmprune.measure.harness import Tasks, TaskScore
from llmprune.measure.perplexity import perplexity
from llmprune.models.resolve import ModelFolder, resolve, spelled
from llmprune.models.skeleton import load_config, load_tokenizer

_HARNESS = "lm-eval "  # what names of its scores begin with


@dataclass(frozen=True, slots=True)
class Score:
    """A number, named in full.

    Attributes:
        name: such as `token perplexity of pydoc` or `lm-eval pydoc_summary acc`.
        protocol: on what it was measured, in words.
        error: its standard error; None where there is no estimate.
    """

    name: str
    protocol: str
    value: float
    error: float | None
    higher_is_better: bool

    def recovery(self, dense: Score) -> float:
        """How much of the dense model's is left, at best 1 or more: the ratio, turned so that higher is better."""
        high, low = (self.value, dense.value) if self.higher_is_better else (dense.value, self.value)
        return high / low if low else float("nan")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, of the model and, where asked for, of its baseline: the same scores in the same order.

    Attributes:
        baseline_hub_id: None where it is no model on the Hub.
    """

    model: str
    scores: list[Score]
    baseline: str | None
    baseline_hub_id: str | None
    baseline_scores: list[Score] | None
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"date": date.today().isoformat(), "versions": versions()}


def evaluate(
    model: str | Path,
    *,
    texts: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    baseline: str | Path | None = None,
    task_path: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    seqlen: int = 2048,
    windows: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure a dense, pruned or packed model: a bundled name, a folder or a Hub id.

    Args:
        texts: for token perplexity, as on the command line; with no tasks either, `pydoc`.
        tasks: names that lm-eval knows, or that the files in `task_path` define.
        baseline: a model to put beside it.
        limit: documents a task; fewshot: examples before each; batch_size: for tasks; seed: of examples and draws.
        seqlen: tokens a window, capped at the model's positions; windows: at most so many, the first ones.
        dtype: of the model and of its baseline, whose numbers are to compare; `auto` is the model's checkpoint's, but on a
            CPU float32, or bfloat16 where the checkpoint is stored so and this CPU is measured to be faster in it.
        tell: hears what is being measured.

    Raises:
        InputError: a text, task or model cannot be loaded, in one line.
    """
    tasks = listed(tasks)
    texts = listed(texts) or ([] if tasks else ["pydoc"])
    tell = tell or (lambda text: None)
    for name, value in {"batch_size": batch_size, "windows": windows, "limit": limit, "seqlen": seqlen - 1}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least {1 if name != 'seqlen' else 2}")
    if fewshot is not None and fewshot < 0:
        raise InputError(f"fewshot {fewshot} is impossible: give 0 or more")
    with torch.no_grad(), plain_errors("lower --batch-size or --seqlen"):
        harness = Tasks(tasks, None if task_path is None else user_path(task_path, "task path")) if tasks else None
        subjects = [_Subject.find(one, texts, seqlen, windows) for one in (model, baseline) if one is not None]
        where = pick_device(device)
        compute = pick_dtype(dtype, where, load_config(subjects[0].folder.path, quantised=True)).dtype
        options = {"batch_size": batch_size, "limit": limit, "fewshot": fewshot, "seed": seed}
        scores, *others = (one.measure(harness, options, where, compute, tell) for one in subjects)
        settings = {"seqlen": seqlen, "windows": windows, "device": device, "dtype": dtype, **options}
        other, hub_id = (None, None) if baseline is None else (subjects[1].name, subjects[1].folder.hub_id)
        result = Evaluation(subjects[0].name, scores, other, hub_id, others[0] if others else None, settings)
        _keep(result, subjects[0].folder)
        return result


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model, as it was called, and the windows of each text to measure it on."""

    name: str
    folder: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    texts: list[Windows]

    @classmethod
    def find(cls, model: str | Path, texts: Sequence[str], seqlen: int, windows: int | None) -> _Subject:
        folder = resolve(spelled(model))
        tokenizer = load_tokenizer(folder.path)
        cut = [_windows(text, folder.path, tokenizer, seqlen, windows) for text in texts]
        return cls(str(model), folder, tokenizer, cut)

    def measure(
        self,
        harness: Tasks | None,
        options: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        tell: Callable[[str], None],
    ) -> list[Score]:
        """Load the model, measure it on all texts and tasks, and let go of it."""
        tell(f"{self.name}{self.folder.shadowed}: loading")
        loaded, found = load(self.folder.path, device=str(device), dtype=dtype), []
        for text in self.texts:
            tell(f"{self.name}: token perplexity of {text.text}")
            found.append(_perplexity(loaded, text))
        if harness:
            tell(f"{self.name}: {', '.join(harness.names)}")
            found += [_named(score) for score in harness.run(loaded, self.tokenizer, **options)]
        del loaded
        gc.collect()
        return found


def _windows(text: str, folder: Path, tokenizer: PreTrainedTokenizerBase, seqlen: int, most: int | None) -> Windows:
    """Of a text, for a model: the first `most`, of as many tokens as its positions allow."""
    positions = getattr(load_config(folder, quantised=True).get_text_config(), "max_position_embeddings", None) or seqlen
    windows = evaluation_windows(text, tokenizer, seqlen=min(seqlen, positions))
    return Windows(windows.ids[:most], windows.text)


def _perplexity(model: PreTrainedModel, windows: Windows) -> Score:
    found = perplexity(model, windows)
    protocol = f"{count(found.windows, 'window')} x {found.length} tokens{found.computed()}"
    return Score(f"{PERPLEXITY_OF}{windows.text}", protocol, found.value, None, False)


def _named(score: TaskScore) -> Score:
    examples = f", {score.fewshot}-shot" if score.fewshot else ""
    return Score(
        f"{_HARNESS}{score.task} {score.metric}",
        f"{count(score.size, 'document')}{examples}",
        score.value,
        score.error,
        score.higher_is_better,
    )


def _keep(result: Evaluation, folder: ModelFolder) -> None:
    """Add what was measured to the record of the run that made the model, where the user's folder has one."""
    path = folder.path / RECORD
    if not folder.theirs or not path.is_file():
        return
    record = read_json(path)
    same = ("scores", "baseline_scores", "date", "versions", "model")
    own = {key: value for key, value in result.as_dict().items() if key not in same} | {
        "names": [score.name for score in result.scores]
    }
    earlier = [one for one in record.get("evaluations", []) if one.get("key") != own]
    record["evaluations"] = [*earlier, {"key": own, **result.as_dict()}]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as stream:
        json.dump(record, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
    Path(stream.name).chmod(path.stat().st_mode)
    Path(stream.name).replace(path)


def show(result: Evaluation, console: Console) -> None:
    """The table: beside a baseline also what is lost, and how much is left."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    table.add_column("measured in this run", overflow="fold")
    beside = result.baseline_scores
    for name in ("value ± error", *(("baseline", "difference", "recovery") if beside else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for number, score in enumerate(result.scores):
        what, protocol = score.name, score.protocol
        if what.startswith(_HARNESS):  # long names stay whole in 80 columns
            what, protocol = what.removeprefix(_HARNESS), f"{_HARNESS.strip()}, {protocol}"
        row = [f"{what}\n  {protocol}", _shown(score)]
        if beside:
            dense = beside[number]
            row += [_shown(dense), f"{score.value - dense.value:+.4g}", f"{score.recovery(dense):.1%}"]
        table.add_row(*row)
    console.print(table)


def _shown(score: Score) -> str:
    value = f"{score.value:.4f}" if abs(score.value) < 10 else f"{score.value:,.3f}"
    return value if score.error is None else f"{value} ± {score.error:.4f}"
