"""`llmprune recover`: train what pruning left of a model, its zeros kept, and write the result to a new folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.base.errors import InputError, plain_errors, user_path
from llmprune.base.folders import check_output, check_room, publish
from llmprune.base.folders import recover as put_right
from llmprune.base.hardware import dtype_name, pick_device, pick_dtype
from llmprune.base.processes import Ranks, joined
from llmprune.base.words import count
from llmprune.data.documents import GIVEN, names_a_file
from llmprune.data.windows import Windows, evaluation_windows, training_windows
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.job.record import RunRecord, versions
from llmprune.job.recovery import SHARES, RecoverConfig
from llmprune.measure.perplexity import perplexity
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.extras import copy_extras
from llmprune.models.resolve import ModelFolder, spelled
from llmprune.models.skeleton import Skeleton, load_config, load_model, load_tokenizer
from llmprune.output.resume import Manifest, continued, partial_folder
from llmprune.output.write import write_record
from llmprune.runs.pruned import check_teacher, dense_model, evaluated_on, of_bundled, pruned_parameters, pruned_record
from llmprune.runs.result import Result
from llmprune.steps.recover.learning import Aim, Learning, prepare
from llmprune.steps.recover.training import Plan, Trained, train
from llmprune.steps.recover.writing import write_trained

HELD_OUT = 16  # windows that choose the best step, at most, and no more than a tenth
_CHECKPOINTS = 3  # on the disk at once: the last two and the best
_MOMENTS = 2  # of AdamW, in float32 as the weights
_TRAINING = "training"  # the folder of checkpoints, in that of the unfinished run


def recover(model: str | Path, output: str | Path | None = None, *, progress: Progress | None = None, **options: Any) -> Result:
    """Train what is left of a pruned model; what is zero stays zero. Goes on from an unfinished run's last checkpoint.

    The best step by the loss on held-out windows of the training text is kept; where none is better than the beginning, the
    weights stay as they were.

    Args:
        model: a folder that llmprune wrote: weights pruned to any pattern, or heads, neurons or layers removed. Not packed.
        output: the folder to write; None: the model's name with `-recovered`.
        progress: what to show; nothing by default.
        options: the other fields of `RecoverConfig`.

    Raises:
        InputError: bad input, in one line; nothing has been written.
    """
    config = RecoverConfig.create({**options, "model": spelled(model), "output": None if output is None else str(output)})
    return _recover(config, progress or Progress(), in_place=False)


def recover_in_place(folder: Path, config: PruneConfig, progress: Progress) -> Result:
    """Train what a run of `config` has just pruned into `folder`, which the result replaces when it is whole."""
    text = "auto" if config.calibration == GIVEN else config.calibration
    options = {"tokens": config.recover, "text": text, "device": config.device, "output": str(folder)}
    return _recover(RecoverConfig.create({"model": str(folder), **options}), progress, in_place=True)


def _recover(config: RecoverConfig, progress: Progress, *, in_place: bool) -> Result:
    with plain_errors(), joined() as ranks:
        return _Recovery.begin(config, progress, ranks, in_place).run()


@dataclass(frozen=True, slots=True)
class _Recovery:
    """What is to be done, checked.

    Attributes:
        record: that of the run that pruned the model.
        in_place: the result takes the model's own place.
    """

    config: RecoverConfig
    progress: Progress
    ranks: Ranks
    folder: Path
    output: Path
    record: RunRecord
    teacher: ModelFolder | None
    device: torch.device
    compute: torch.dtype
    training: Windows
    evaluation: Windows | None
    in_place: bool

    @classmethod
    def begin(cls, config: RecoverConfig, progress: Progress, ranks: Ranks, in_place: bool) -> _Recovery:
        """Raises: InputError: it is not possible."""
        folder = user_path(config.model, "model")
        record = pruned_record(folder)
        output = user_path(config.output or f"{folder.name}-recovered", "output")
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
        teacher = dense_model(config, record) if SHARES[config.loss] or evaluated else None
        if teacher:
            check_teacher(teacher, own.get_text_config().vocab_size, tokenizer)
        text = ("pydoc" if of_bundled(record) else "c4") if config.text == "auto" else config.text
        if evaluated and names_a_file(text) and evaluated == text:
            raise InputError(f"text {text} is what perplexity is measured on: train on another, or pass --eval-text")
        positions = getattr(own.get_text_config(), "max_position_embeddings", None) or config.seqlen
        seqlen = min(config.seqlen, positions)
        steps = config.steps(seqlen)
        wanted = steps * config.batch_size * seqlen + HELD_OUT * seqlen
        training = training_windows(text, tokenizer, tokens=wanted, seqlen=seqlen, seed=config.seed)
        evaluation = evaluation_windows(evaluated, tokenizer, seqlen=seqlen) if evaluated else None
        return cls(config, progress, ranks, folder, output, record, teacher, device, compute, training, evaluation, in_place)

    def run(self) -> Result:
        skeleton = Skeleton(Checkpoint(self.folder), load_config(self.folder), torch.device("meta"), torch.float32)
        model = load_model(self.folder, load_config(self.folder), self.device, torch.float32)
        storage, pruned = skeleton.storage(), pruned_parameters(skeleton, self.record)
        config = self.config
        learning = prepare(model, config.train, pruned, storage, rank=config.rank, seed=config.seed)
        everything, own = (sum(p.numel() for p in some) for some in (model.parameters(), learning.learned()))
        check_room(self.output, skeleton.checkpoint.nbytes() + 4 * _CHECKPOINTS * (everything + _MOMENTS * own))
        teacher = self._load_teacher()
        self._announce(own)
        with ExitStack() as unfinished:
            manifest = None
            if self.ranks.first:  # which alone writes
                fingerprint = self._fingerprint(skeleton.checkpoint)
                told = "training, up to the last checkpoint"
                opened = continued(self.output, fingerprint, config.restart, self.progress.note, told)
                manifest = unfinished.enter_context(opened)
            self.ranks.agree(None)
            values = self._measured(model, teacher) if self.evaluation else {}
            found = self._train(learning, teacher, manifest)
            self.record.dense = values.get("dense")
            self.record.pruned = perplexity(model.eval(), self.evaluation) if self.evaluation else None
            self.record.recovery = self._told(found, values)
            if manifest:
                self._write(learning, skeleton, manifest.folder)
                publish(manifest.folder, self.output, overwrite=config.overwrite or self.in_place)
        self.ranks.agree(None)  # the output is there when any process returns
        self.progress.recovered(self.record, self.output)
        return Result(self.record, None, self.output)

    def _load_teacher(self) -> PreTrainedModel | None:
        if self.teacher is None:
            return None
        teacher = load_model(self.teacher.path, load_config(self.teacher.path), self.device, self.compute)
        return teacher.requires_grad_(False)

    def _announce(self, trained: int) -> None:
        config, windows = self.config, self.training
        seqlen, steps = windows.ids.shape[1], self._steps()
        each = f"{count(config.batch_size, 'window')} x {seqlen} tokens"
        what = {
            "kept": "kept weights of the blocks, with their zeros",
            "small": "norms and biases of the blocks",
            "lora": f"adapters of rank {config.rank} on the pruned matrices, under their masks",
        }[config.train]
        named = self.teacher.name if self.teacher else ""
        aim = {"kd": f"to imitate {named}", "ce": "to predict the text", "mix": f"to imitate {named} and predict the text"}
        self.progress.facts({
            "model": f"{self.folder} ({self.record.model['class']}, of {self.record.model['name']})",
            "training": f"{what} ({count(trained, 'parameter')}), {aim[config.loss]}; AdamW, rate {config.peak():g}",
            "text": f"{windows.text}, {count(steps, 'step')} of {each}, seed {config.seed}",
            "compute": f"{dtype_name(self.compute)} on {self.device}, weights trained in float32",
        })  # fmt: skip
        if (wanted := steps * config.batch_size) > (there := len(self._split()[0].ids)):
            self.progress.note(f"the text has {count(there, 'window')}: it is read {wanted / there:.1f} times")

    def _steps(self) -> int:
        return self.config.steps(self.training.ids.shape[1])

    def _split(self) -> tuple[Windows, Windows]:
        """Windows to train on, and those that are held out."""
        ids, text = self.training.ids, self.training.text
        some = max(min(HELD_OUT, len(ids) // 10), 1)
        return Windows(ids[some:], text), Windows(ids[:some], text)

    def _train(self, learning: Learning, teacher: PreTrainedModel | None, manifest: Manifest | None) -> Trained:
        config, (windows, held_out) = self.config, self._split()
        plan = Plan(
            windows,
            held_out,
            self._steps(),
            config.batch_size // self.ranks.size,
            self.ranks.size,
            config.peak(),
            config.seed,
            self.compute,
            partial_folder(self.output) / _TRAINING,
        )
        aim = Aim(teacher, SHARES[config.loss])
        found = train(learning, aim, plan, manifest.begin if manifest else _nothing, self.progress.trained)
        if found.diverged:
            self.progress.note(f"training was stopped, for it diverged: {found.diverged}; a lower --rate may help")
        if not found.best:
            self.progress.note("no step was better than the beginning on held-out text: the weights stay as they were")
        return found

    @torch.no_grad()
    def _measured(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> dict[str, Any]:
        """Perplexities before training."""
        assert teacher is not None
        assert self.evaluation is not None
        return {"dense": perplexity(teacher, self.evaluation), "before": perplexity(model.eval(), self.evaluation)}

    def _told(self, found: Trained, values: Mapping[str, Any]) -> dict[str, Any]:
        config, teacher = self.config, self.teacher
        before, dense = values.get("before"), values.get("dense")
        return {
            "arguments": asdict(config),
            "teacher": teacher.name if teacher else None,
            "teacher_hub_id": teacher.hub_id if teacher else None,
            "text": self.training.text,
            "tokens": found.tokens,
            "steps": found.steps,
            "best": found.best,
            "rate": config.peak(),
            "loss_before": found.before,
            "loss_after": found.after,
            "held_out": found.held_out,
            "trained": found.trained,
            "diverged": found.diverged,
            "seconds": found.seconds,
            "excess_loss_before": math.log(before.value / dense.value) if before and dense else None,
            "compute": f"{dtype_name(self.compute)} on {self.device}",
        }

    def _write(self, learning: Learning, skeleton: Skeleton, folder: Path) -> None:
        shutil.rmtree(folder / _TRAINING, ignore_errors=True)
        copy_extras(self.folder, folder)
        write_trained(learning.model, skeleton, learning.changed, folder)
        write_record(folder, self.record, self.output.name)

    def _fingerprint(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """All that decides the result."""
        passing = ("model", "teacher", "text", "eval_text", "output", "overwrite", "restart")
        return {
            **{f"--{name.replace('_', '-')}": value for name, value in asdict(self.config).items() if name not in passing},
            **{f"version of {package}": version for package, version in versions().items()},
            "training text": self.training.digest(),
            "model": checkpoint.fingerprint(),
            "teacher": Checkpoint(self.teacher.path).fingerprint() if self.teacher else None,
            "compute": f"{dtype_name(self.compute)} on {self.device}",
            "processes": self.ranks.size,
        }


def _nothing() -> None: ...
