"""A budget of time: what layers of every size are measured to take, and the models that come of it, timed whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from llmprune.base.hardware import dtype_name, processor_name, stored_dtype
from llmprune.base.notation import read_speedup
from llmprune.base.words import size
from llmprune.cost.disk_bytes import of_block
from llmprune.cost.milliseconds import Pace, Table
from llmprune.job.job import Job
from llmprune.measure.pace import Timed, layers_to_time, pace_of
from llmprune.measure.whole import Use, compared
from llmprune.models.skeleton import load_config, load_model
from llmprune.steps.structured.kinds import Kinds
from llmprune.steps.structured.limits import Limit
from llmprune.steps.structured.sizes import Sizes
from llmprune.steps.structured.sizing import Builder

APART = 0.05  # by which a measured speed-up may differ from the predicted one without a word
_SIZES = 6  # of each kind that are measured, at most
_SECONDS = 12.0  # of timing two whole models
_LOADED = 1.2  # of two models' weights: what they take in memory as they are timed
_PASSING = ("_name_or_path", "transformers_version", "architectures", "dtype")


class Speed:
    """The budget that `target_speedup` is. What is measured is the first process's, on its device."""

    def __init__(self, builder: Builder, kinds: Kinds, job: Job) -> None:
        self._builder, self._kinds, self._job = builder, kinds, job
        skeleton = builder.skeleton
        self._config, self._device, self._dtype = skeleton.model.config, skeleton.device, skeleton.dtype
        self.asked = read_speedup(job.config.target_speedup or "")
        self.use = Use.of(job.config, self._config)

    def __str__(self) -> str:
        return f"{self.asked:g}x the speed in {self.use}"

    @cached_property
    def pace(self) -> Pace:
        """What the parts of the model take."""
        job = self._job
        found = None
        if job.ranks.first:
            with job.clock("time"):
                table = Table.of(self._device, self._dtype)
                found = pace_of(self._timed(), self.use, table, self._device, job.progress.note)
        return job.ranks.agree(found)  # type: ignore[return-value]  # the first process has one

    def _timed(self) -> Timed:
        blocks = self._builder.blocks
        layers = layers_to_time(max(of_block(self._config, block) for block in blocks), len(blocks))
        smaller = {
            name: {
                gone: (f"{kind.count - gone} of {kind.count} {name}", self._build({name: gone})) for gone in some(kind.loads)
            }
            for name, kind in self._kinds.found.items()
        }
        facts = {name: value for name, value in self._config.to_dict().items() if name not in _PASSING}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return Timed(f"{type(self._builder.skeleton.model).__name__} {digest}", layers, self._build({}), smaller)

    def _build(self, gone: dict[str, int]) -> Any:
        sizes = self._kinds.sizes([gone])[0]

        def build(count: int) -> PreTrainedModel:
            """Of layers at equal distances, so that kinds of layers are there in the shares that the model has."""
            every = len(self._builder.blocks)
            return self._builder.target([number * every // count for number in range(count)], [sizes] * count).stand_in()

        return build

    def limit(self, factor: float = 1.0) -> Limit:
        """Milliseconds that are left, if what is predicted comes out `factor` times as fast."""
        pace, every = self.pace, len(self._builder.blocks)
        whole = pace.of(every)

        def refused(least: float) -> str:
            return (
                f"target_speedup {self.asked:g}x is {whole / self.asked:.2f} of {whole:.2f} ms in {self.use}, but one layer "
                f"at its smallest and all that is outside the layers take {least:.2f} ms: ask for at most {whole / least:.2f}x"
            )

        return Limit(
            whole / self.asked * factor, whole, [pace.layer] * every, lambda kind, _, gone: pace.saved(kind, gone), refused
        )

    def predicted(self, gone: Sequence[Mapping[str, int]]) -> float:
        """The speed-up of a model whose layers, as many as `gone` has, have lost so many parts of each kind."""
        saved = sum(self.pace.saved(kind, number) for one in gone for kind, number in one.items())
        return self.pace.of(len(self._builder.blocks)) / (self.pace.of(len(gone)) - saved)

    def tried(self, layers: list[int], sizes: Sequence[Sizes]) -> float | None:
        """The speed-up of a model of these sizes, measured whole, with weights of no value; None where memory is short."""
        every = list(range(len(self._builder.blocks)))
        shapes = [(every, [Sizes(None, None, None, False)] * len(every)), (layers, list(sizes))]
        targets = [self._builder.target(*shape) for shape in shapes]
        if self._short(sum(parameter.numel() for target in targets for parameter in target.model.parameters())):
            return None
        with self._job.clock("time"):
            dense, smaller = self._compared([target.stand_in() for target in targets])
        return dense / smaller

    def finish(self, speed: dict[str, Any], dense: Path, smaller: Path) -> dict[str, Any]:
        """`speed`, as `record` made it, with milliseconds of one call of the two folders' models, whole; without them where
        memory is short."""
        configs = {folder: load_config(folder) for folder in (dense, smaller)}
        stored = sum(file.stat().st_size for folder in configs for file in folder.glob("*.safetensors"))
        if self._short(stored // stored_dtype(self._config).itemsize):
            return speed
        with self._job.clock("time"):
            models = [load_model(folder, config, self._device, self._dtype).eval() for folder, config in configs.items()]
            for parameter in (parameter for model in models for parameter in model.parameters()):
                parameter.data = parameter.data.clone()  # pages of a mapped file are slower on a CPU, by 15% to 25% in decoding
            times = self._compared(models)
        found, predicted = times[0] / times[1], speed["predicted"]
        if abs(found / predicted - 1) > APART:
            apart = f"predicted to be {predicted:.2f}x as fast in {self.use}, measured to be {found:.2f}x"
            self._job.progress.note(f"{apart}: {abs(found / predicted - 1):.0%} {'more' if found > predicted else 'less'}")
        return {**speed, "dense_ms": times[0], "smaller_ms": times[1]}

    def _compared(self, models: list[PreTrainedModel]) -> list[float]:
        return [1000 * seconds for seconds in compared(models, self.use, self._device, _SECONDS)]

    def _short(self, parameters: int) -> bool:
        """Whether memory is too short for so many; says so."""
        needed = _LOADED * parameters * self._dtype.itemsize
        on_gpu = self._device.type == "cuda"
        free = torch.cuda.mem_get_info(self._device)[0] if on_gpu else psutil.virtual_memory().available
        if needed > free:
            both = f"timing both models whole takes {size(needed)} of memory"
            self._job.progress.note(f"{both}, and {size(free)} are free: the speed-up is predicted, not measured")
        return needed > free

    def record(self, predicted: float, corrected: float) -> dict[str, Any]:
        """What was asked and predicted, and where that holds, as plain data. Milliseconds are to be measured: see `finish`.

        Args:
            corrected: how many times as fast as the table says a first choice was measured to be; 1 where none was.
        """
        return {
            "use": str(self.use),
            **asdict(self.use),
            "asked": self.asked,
            "predicted": predicted,
            "corrected": corrected,
            "dense_ms": None,
            "smaller_ms": None,
            "device": processor_name(self._device),
            "threads": torch.get_num_threads(),
            "dtype": dtype_name(self._dtype),
        }


def some(counts: Sequence[int]) -> list[int]:
    """Of numbers that may go, 0 first, those that are measured: at most six at equal distances, the last among them."""
    able = counts[1:]
    number = min(len(able), _SIZES)
    return sorted({able[-1 - round(i * (len(able) - 1) / max(number - 1, 1))] for i in range(number)})
