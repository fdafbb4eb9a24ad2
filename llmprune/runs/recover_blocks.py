"""Training of a pruned model block by block, with one block of it and of its teacher in memory."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from llmprune.base.clock import Clock
from llmprune.base.errors import InputError
from llmprune.base.folders import existing_parent
from llmprune.base.words import count
from llmprune.job.recipes import PASSES
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.extras import copy_extras
from llmprune.models.skeleton import Skeleton, load_config
from llmprune.output.resume import Manifest, partial_folder
from llmprune.runs.recovery import Recovery
from llmprune.steps.fitting import RATE
from llmprune.steps.recover.blocks import Shared, Twins, train_blocks

_STREAMS = 2  # of hidden states, for the text that is trained on


class ByBlock:
    """A `Way`: each block is fitted to what the dense model makes of the text."""

    begun = "nothing"

    def __init__(self, task: Recovery) -> None:
        assert task.teacher is not None
        there, batch = len(task.training.ids), task.config.batch_size
        if there <= batch:
            raise InputError(
                f"{count(there, 'window')} of text {task.training.text} are one batch of {batch}, and another is held out: ask "
                "for more --tokens or a smaller --batch-size"
            )
        self._task = task
        pruned, dense = (
            Skeleton(Checkpoint(folder), load_config(folder), task.device, task.compute)
            for folder in (task.folder, task.teacher.path)
        )
        gone = set(task.record.structure.get("removed_layers", ()))
        layers = [layer for layer in range(len(dense.blocks)) if layer not in gone]
        self._twins = Twins(pruned, dense, layers, {site.name for site in task.record.sites})

    def __str__(self) -> str:
        assert self._task.teacher is not None
        return f"block by block, to put out what those of {self._task.teacher.name} do; Adam, {PASSES} passes, rate {RATE:g}"

    def room(self) -> int:
        config = self._twins.pruned.model.config.get_text_config()
        hidden = _STREAMS * self._task.training.ids.numel() * config.hidden_size * self._task.compute.itemsize
        return self._twins.pruned.checkpoint.nbytes() + (hidden if self._on_disk() else 0)

    def _on_disk(self) -> bool:
        return self._task.config.activations == "disk"

    def run(self, manifest: Manifest | None) -> None:
        task, clock, began = self._task, Clock(), time.monotonic()
        clock.device = task.device
        scratch = existing_parent(task.output) if self._on_disk() else None
        shared = Shared(task.config.batch_size // task.ranks.size, task.ranks, clock, task.progress, scratch)
        found = train_blocks(self._twins, task.training, task.evaluation, shared, partial_folder(task.output), manifest)
        told = {
            "tokens": task.training.tokens(),
            "steps": sum(fit.steps for fit in found.fits),
            "loss_before": mean(fit.before for fit in found.fits),
            "loss_after": mean(fit.after for fit in found.fits),
            "blocks": [asdict(fit) for fit in found.fits],
            "seconds": time.monotonic() - began,
        }
        task.fill_in(told, found.dense, found.before, found.after)

    def write(self, folder: Path) -> None:
        copy_extras(self._task.folder, folder)
