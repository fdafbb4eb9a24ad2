"""The loop: transformers' Trainer, with our loss, that keeps the best step and stops where training diverges."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from llmprune.job.progress import Progressed
from llmprune.steps.recover.examples import Examples
from llmprune.steps.recover.learning import Aim, Learning, losses

EVALUATIONS = 20  # of the held-out windows while it trains, at most
_CHEAP = 4  # windows trained on for each that is measured, at least: one costs half as much to measure
_HOPELESS = 2.0  # times the loss that it began with, after which training stops
_LITTLE = 0.02  # nats more than that loss, up to which it goes on however little it began with
_WARMUP = 0.05  # of all steps
_MOMENTS = (0.9, 0.95)  # of AdamW, as language models are trained with

Point = tuple[int, float]
Tell = Callable[[Progressed], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train.

    Attributes:
        batch: windows a step, of each of so many `processes`.
        examples: to train on; `held_out`: to choose the best step by. Both of one text, disjoint.
        rate: the peak of AdamW's, reached after a twentieth of the steps, from which it falls to zero by a cosine.
        folder: for checkpoints, from which training goes on.
    """

    examples: Examples
    held_out: Examples
    steps: int
    batch: int
    processes: int
    rate: float
    seed: int
    compute: torch.dtype
    folder: Path

    @property
    def tokens_a_step(self) -> int:
        return self.batch * self.processes * self.examples.windows.ids.shape[1]


@dataclass(slots=True)
class Trained:
    """What came of it. The curves have steps, and losses in nats a token.

    Attributes:
        best: the step whose weights the model has now; 0: those that it began with.
        diverged: why training stopped before its end, if it did.
    """

    before: float
    after: float
    best: int
    steps: int
    held_out: list[Point]
    trained: list[Point]
    tokens: int
    seconds: float
    diverged: str | None = None

    def told(self) -> dict[str, Any]:
        """For the record."""
        names = ("tokens", "steps", "best", "held_out", "trained", "diverged", "seconds")
        return {name: getattr(self, name) for name in names} | {"loss_before": self.before, "loss_after": self.after}


class _Distiller(Trainer):
    """A `Trainer` of our loss."""

    aim: Aim = Aim()
    compute: torch.dtype = torch.float32

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with torch.autocast(self.args.device.type, self.compute, enabled=self.compute != torch.float32):
            loss = losses(model, self.aim, inputs)
        return (loss, {}) if return_outputs else loss


@dataclass
class _Watch(TrainerCallback):
    """Tells how it goes, and stops what is hopeless."""

    plan: Plan
    tell: Tell
    saved: Callable[[], None]
    began: float = field(default_factory=time.monotonic)
    first: int = 0
    start: float = 0.0
    since: float | None = None
    diverged: str | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_evaluate |= state.global_step == self.plan.steps

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any) -> None:
        logs = told["logs"]
        if "loss" in logs:
            self.since = float(logs["loss"])
            if not math.isfinite(self.since):
                self._stop(f"the loss is {self.since} after step {state.global_step}", control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **told: Any) -> None:
        found, plan = told["metrics"]["eval_loss"], self.plan
        taken, done = time.monotonic() - self.began, state.global_step - self.first
        speed = done * plan.tokens_a_step / max(taken, 1e-9)
        left = taken / max(done, 1) * (plan.steps - state.global_step)
        self.tell(Progressed(state.global_step, plan.steps, found, self.since, speed, left))
        if not found < max(_HOPELESS * self.start, self.start + _LITTLE):
            self._stop(f"the held-out loss is {found:.4g} after step {state.global_step}, from {self.start:.4g}", control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved()

    def _stop(self, why: str, control: TrainerControl) -> None:
        self.diverged, control.should_training_stop = why, True


def train(
    learning: Learning,
    aim: Aim,
    plan: Plan,
    saved: Callable[[], None],
    tell: Tell,
) -> Trained:
    """Train; the model ends with the best weights that were met, as they will be saved.

    Args:
        saved: is called when there is a checkpoint to go on from.
    """
    model = learning.model
    watch = _Watch(plan, tell, saved)
    trainer = _Distiller(
        model=model,
        args=_arguments(plan, use_cpu=model.device.type == "cpu"),
        train_dataset=plan.examples,
        eval_dataset=plan.held_out,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.aim, trainer.compute = aim, plan.compute
    before = _held_out(model, aim, plan)
    watch.start = before
    last = get_last_checkpoint(str(plan.folder)) if plan.folder.is_dir() else None
    with _quiet():
        trainer.train(resume_from_checkpoint=last)
    learning.settle()
    state, after = trainer.state, _held_out(model.eval(), aim, plan)
    best = int(state.best_global_step or 0)
    if not after < before:
        best, after = 0, before
        learning.restore()
    return Trained(
        before=before,
        after=after,
        best=best,
        steps=state.global_step,
        held_out=[(0, before), *_curve(state.log_history, "eval_loss")],
        trained=_curve(state.log_history, "loss"),
        tokens=state.global_step * plan.tokens_a_step,
        seconds=time.monotonic() - watch.began,
        diverged=watch.diverged,
    )


def _arguments(plan: Plan, *, use_cpu: bool) -> TrainingArguments:
    cheap = math.ceil(_CHEAP * len(plan.held_out) / (plan.batch * plan.processes))
    every = max(plan.steps // EVALUATIONS, min(cheap, plan.steps))
    return TrainingArguments(
        output_dir=str(plan.folder),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch,
        per_device_eval_batch_size=plan.batch,
        learning_rate=plan.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(round(_WARMUP * plan.steps), 1),
        weight_decay=0.0,
        adam_beta1=_MOMENTS[0],
        adam_beta2=_MOMENTS[1],
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=every,
        logging_nan_inf_filter=False,
        seed=plan.seed,
        data_seed=plan.seed,
        use_cpu=use_cpu,
        report_to=[],
        disable_tqdm=True,
        prediction_loss_only=True,
        label_names=["input_ids"],  # so that it asks for the loss when it evaluates
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars for every checkpoint that is written, what is said of tied weights in it, and torch's advice on data."""
    shown, said = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch.utils.data")
            yield
    finally:
        logging.set_verbosity(said)
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _held_out(model: PreTrainedModel, aim: Aim, plan: Plan) -> float:
    """The mean loss on the held-out windows."""
    total = 0.0
    for inputs in plan.held_out.batches(plan.batch, model.device):
        with torch.autocast(model.device.type, plan.compute, enabled=plan.compute != torch.float32):
            total += float(losses(model, aim, inputs)) * len(inputs["input_ids"])
    return total / len(plan.held_out)


def _curve(history: list[dict[str, float]], name: str) -> list[Point]:
    """Of finite numbers."""
    return [(int(one["step"]), float(one[name])) for one in history if name in one and math.isfinite(one[name])]
