"""Training of a whole pruned model, beside its teacher."""

from __future__ import annotations

import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmprune.base.hardware import freed_memory_kept
from llmprune.base.words import count
from llmprune.data.windows import Windows
from llmprune.job.recovery import SHARES
from llmprune.measure.perplexity import perplexity
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.extras import copy_extras
from llmprune.models.skeleton import Skeleton, load_config, load_model
from llmprune.output.resume import Manifest, partial_folder
from llmprune.runs.pruned import pruned_parameters
from llmprune.runs.recovery import HELD_OUT, Recovery
from llmprune.steps.recover.examples import Examples, Predictions, keep, nbytes
from llmprune.steps.recover.learning import Aim, prepare, rewind
from llmprune.steps.recover.training import Plan, Trained, train
from llmprune.steps.recover.writing import write_trained

_CHECKPOINTS = 3  # on the disk at once: the last two and the best
_MOMENTS = 2  # of AdamW, in float32 as the weights
_TRAINING, _TEACHER = "training", "teacher"  # folders of checkpoints and of kept predictions, in that of the unfinished run
_TELL = 10  # times, how much of the text the teacher has predicted


class Whole:
    """A `Way`: transformers' Trainer on the whole model in memory."""

    begun = "training, up to the last checkpoint"

    def __init__(self, task: Recovery) -> None:
        self._task, config, folder = task, task.config, task.folder
        self._source = Skeleton(Checkpoint(folder), load_config(folder), torch.device("meta"), torch.float32)
        self._model = load_model(folder, load_config(folder), task.device, torch.float32)
        storage, pruned = self._source.storage(), pruned_parameters(self._source, task.record)
        if task.rewind:
            earlier = load_model(task.rewind.path, load_config(task.rewind.path), task.device, torch.float32)
            rewind(self._model, earlier, pruned)
        self._learning = prepare(self._model, config.train, pruned, storage, rank=config.rank, seed=config.seed)
        self._teacher = self._load_teacher()
        self._top = min(config.teacher_top or 0, self._model.config.get_text_config().vocab_size - 1)

    def _load_teacher(self) -> PreTrainedModel | None:
        task = self._task
        if task.teacher is None:
            return None
        return load_model(task.teacher.path, load_config(task.teacher.path), task.device, task.compute).requires_grad_(False)

    def __str__(self) -> str:
        config, teacher = self._task.config, self._task.teacher
        what = {
            "kept": "kept weights of the blocks, with their zeros",
            "small": "norms and biases of the blocks",
            "lora": f"adapters of rank {config.rank} on the pruned matrices, under their masks",
        }[config.train]
        named = teacher.name if teacher else ""
        aim = {"kd": f"to imitate {named}", "ce": "to predict the text", "mix": f"to imitate {named} and predict the text"}
        begin = f", begun at {self._task.rewind.name}" if self._task.rewind else ""
        return f"{what} ({count(self._learned(), 'parameter')}){begin}, {aim[config.loss]}; AdamW, rate {self._rate():.2g}"

    def _rate(self) -> float:
        return self._task.config.peak(next(self._model.get_input_embeddings().parameters()).shape[-1])

    def _learned(self) -> int:
        return sum(parameter.numel() for parameter in self._learning.learned())

    def room(self) -> int:
        everything = sum(parameter.numel() for parameter in self._model.parameters())
        kept = nbytes(self._task.training, self._top) if self._top else 0
        return self._source.checkpoint.nbytes() + 4 * _CHECKPOINTS * (everything + _MOMENTS * self._learned()) + kept

    def run(self, manifest: Manifest | None) -> None:
        task, model = self._task, self._model
        text, teacher = task.evaluation, self._teacher
        dense = perplexity(teacher, text) if text and teacher else None
        before = perplexity(model.eval(), text) if text else None
        if self._top:
            self._keep_predictions(manifest)
        found = self._train(manifest)
        task.fill_in({**found.told(), "rate": self._rate()}, dense, before, perplexity(model.eval(), text) if text else None)

    def _keep_predictions(self, manifest: Manifest | None) -> None:
        """Have the teacher predict the text, and let go of it."""
        task, teacher, began, told = self._task, self._teacher, time.monotonic(), 0.0
        assert teacher is not None
        folder = partial_folder(task.output) / _TEACHER
        for done in keep(teacher, task.training, self._top, folder, (task.ranks.rank, task.ranks.size)):
            if manifest:
                manifest.begin()
            if done >= told:
                left = (time.monotonic() - began) / done * (1 - done)
                task.progress.note(f"the teacher has predicted {done:.0%} of the text; ETA {left:.0f} s")
                told = done + 1 / _TELL
        self._teacher = None
        task.ranks.agree(None)

    def _train(self, manifest: Manifest | None) -> Trained:
        task, (windows, held_out) = self._task, self._split()
        config, steps = task.config, task.steps()
        if (wanted := steps * config.batch_size) > (there := len(windows)):
            task.progress.note(f"the text has {count(there, 'window')}: it is read {wanted / there:.1f} times")
        plan = Plan(
            windows,
            held_out,
            steps,
            config.batch_size // task.ranks.size,
            task.ranks.size,
            self._rate(),
            config.seed,
            task.compute,
            partial_folder(task.output) / _TRAINING,
        )
        aim, saved = Aim(self._teacher, SHARES[config.loss]), manifest.begin if manifest else _nothing
        with freed_memory_kept() if task.device.type == "cpu" else nullcontext():
            found = train(self._learning, aim, plan, saved, task.progress.trained)
        if found.diverged:
            task.progress.note(f"training was stopped, for it diverged: {found.diverged}; a lower --rate may help")
        if not found.best:
            task.progress.note("no step was better than the beginning on held-out text: the weights stay as they were")
        return found

    def _split(self) -> tuple[Examples, Examples]:
        """What is trained on, and what is held out."""
        ids, text = self._task.training.ids, self._task.training.text
        some = max(min(HELD_OUT, len(ids) // HELD_OUT), 1)
        folder = partial_folder(self._task.output) / _TEACHER
        kept, held_out = (Predictions(folder, first) if self._top else None for first in (some, 0))
        return Examples(Windows(ids[some:], text), kept), Examples(Windows(ids[:some], text), held_out)

    def write(self, folder: Path) -> None:
        for name in (_TRAINING, _TEACHER):
            shutil.rmtree(folder / name, ignore_errors=True)
        copy_extras(self._task.folder, folder)
        write_trained(self._model, self._source, self._learning.changed, folder)


def _nothing() -> None: ...
