"""What a training after pruning begins with: the pruned folder and its record, its dense model, and texts, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llmprune.base.errors import InputError, user_path
from llmprune.base.folders import check_output
from llmprune.base.folders import recover as put_right
from llmprune.base.hardware import dtype_name, pick_device, pick_dtype
from llmprune.base.processes import Ranks
from llmprune.base.words import count
from llmprune.data.documents import names_a_file
from llmprune.data.windows import Windows, evaluation_windows, training_windows
from llmprune.job.progress import Progress
from llmprune.job.record import Perplexity, RunRecord, excess_loss, versions
from llmprune.job.recovery import BLOCKS, RECOVERED, SHARES, RecoverConfig
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.resolve import ModelFolder, resolve
from llmprune.models.skeleton import load_config, load_tokenizer
from llmprune.output.resume import Manifest
from llmprune.runs.pruned import check_teacher, dense_model, evaluated_on, of_bundled, pruned_record

HELD_OUT = 8  # windows that choose the best step, at most, and no more than an eighth


@dataclass(frozen=True, slots=True)
class Recovery:
    """What is to be done, checked.

    Attributes:
        record: that of the run that pruned the model.
        rewind: an earlier checkpoint of the dense model, to begin with.
        in_place: the result takes the model's own place.
    """

    config: RecoverConfig
    progress: Progress
    ranks: Ranks
    folder: Path
    output: Path
    record: RunRecord
    teacher: ModelFolder | None
    rewind: ModelFolder | None
    device: torch.device
    compute: torch.dtype
    training: Windows
    evaluation: Windows | None
    in_place: bool

    @classmethod
    def begin(cls, config: RecoverConfig, progress: Progress, ranks: Ranks, in_place: bool) -> Recovery:
        """Raises: InputError: it is not possible."""
        folder = user_path(config.model, "model")
        record = pruned_record(folder)
        if record.channels and (config.rewind or config.train == BLOCKS):
            what = "--rewind" if config.rewind else f"--train {BLOCKS}"
            how = " and ".join(record.channels)
            raise InputError(
                f"{what} needs the channels of {record.model['name']}, and those of {folder} were {how}: train it otherwise"
            )
        output = user_path(config.output or f"{folder.name}{RECOVERED}", "output")
        if config.batch_size % ranks.size:
            raise InputError(
                f"{count(ranks.size, 'process')} cannot share {count(config.batch_size, 'window')}: give a multiple"
            )
        if ranks.first:
            put_right(output)
        ranks.agree(None)
        if not in_place:
            check_output(output, folder, config.overwrite)
        own, device = load_config(folder), pick_device(config.device, ranks.local)
        compute = ranks.agree(pick_dtype(config.dtype, device, own)[0])
        tokenizer = load_tokenizer(folder)
        evaluated = evaluated_on(config, record)
        imitates = config.train == BLOCKS or SHARES[config.loss] > 0
        teacher = dense_model(config, record) if imitates or evaluated else None
        if teacher:
            check_teacher(teacher, own.get_text_config().vocab_size, tokenizer)
        rewind = resolve(config.rewind) if config.rewind else None
        text = ("pydoc" if of_bundled(record) else "c4") if config.text == "auto" else config.text
        if evaluated and names_a_file(text) and evaluated == text:
            raise InputError(f"text {text} is what perplexity is measured on: train on another, or pass --eval-text")
        positions = getattr(own.get_text_config(), "max_position_embeddings", None) or config.seqlen
        seqlen = min(config.seqlen, positions)
        steps = config.steps(seqlen)
        wanted = (steps * config.batch_size + (0 if config.train == BLOCKS else HELD_OUT)) * seqlen
        training = training_windows(text, tokenizer, tokens=wanted, seqlen=seqlen, seed=config.seed)
        evaluation = evaluation_windows(evaluated, tokenizer, seqlen=seqlen) if evaluated else None
        models = (record, teacher, rewind)
        return cls(config, progress, ranks, folder, output, *models, device, compute, training, evaluation, in_place)

    def steps(self) -> int:
        """Optimiser steps on the text, once."""
        return self.config.steps(self.training.ids.shape[1])

    def announce(self, training: str) -> None:
        """Say what is about to be done."""
        config, windows = self.config, self.training
        each = f"{count(config.batch_size, 'window')} x {windows.ids.shape[1]} tokens"
        self.progress.facts({
            "model": f"{self.folder} ({self.record.model['class']}, of {self.record.model['name']})",
            "training": training,
            "text": f"{windows.text}, {count(self.steps(), 'step')} of {each}, seed {config.seed}",
            "compute": f"{dtype_name(self.compute)} on {self.device}, weights trained in float32",
        })  # fmt: skip

    def fill_in(
        self, told: Mapping[str, Any], dense: Perplexity | None, before: Perplexity | None, after: Perplexity | None
    ) -> None:
        """Record what came of it, and the perplexities of the dense model and before and after, if they were measured."""
        record, teacher = self.record, self.teacher
        record.dense, record.pruned = dense, after
        whole = {
            "arguments": asdict(self.config),
            "teacher": teacher.name if teacher else None,
            "teacher_hub_id": teacher.hub_id if teacher else None,
            "rewind_hub_id": self.rewind.hub_id if self.rewind else None,
            "text": self.training.text,
            "excess_loss_before": excess_loss(dense, before) if dense and before else None,
            "compute": f"{dtype_name(self.compute)} on {self.device}",
            **told,
        }
        record.recoveries = [*record.recoveries, whole]

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the result."""
        passing = ("model", "teacher", "rewind", "text", "eval_text", "output", "overwrite", "restart", "activations")
        return {
            **{f"--{name.replace('_', '-')}": value for name, value in asdict(self.config).items() if name not in passing},
            **{f"version of {package}": version for package, version in versions().items()},
            "training text": self.training.digest(),
            "model": Checkpoint(self.folder).fingerprint(),
            "teacher": Checkpoint(self.teacher.path).fingerprint() if self.teacher else None,
            "rewind": Checkpoint(self.rewind.path).fingerprint() if self.rewind else None,
            "compute": f"{dtype_name(self.compute)} on {self.device}",
            "processes": self.ranks.size,
        }


class Way(Protocol):
    """How a model is trained: whole, or block by block."""

    begun: str  # what is finished where no block is

    def __init__(self, task: Recovery) -> None:
        """Raises: InputError: it is not possible."""
        ...

    def __str__(self) -> str:
        """What is trained, towards what."""
        ...

    def room(self) -> int:
        """Bytes that it takes on the disk."""
        ...

    def run(self, manifest: Manifest | None) -> None:
        """Train, and fill in the record.

        Args:
            manifest: of the unfinished output, on the process that writes.
        """
        ...

    def write(self, folder: Path) -> None:
        """Write the trained model, all but its card and record."""
        ...
