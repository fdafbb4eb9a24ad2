"""A run over a model in memory, which is pruned in place."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.base.errors import InputError
from llmprune.base.folders import published
from llmprune.base.hardware import pick_device
from llmprune.job.job import Job
from llmprune.job.record import RunRecord, SiteRecord
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks
from llmprune.models.names import Names, locate, match_names
from llmprune.models.resolve import ModelFolder
from llmprune.models.sites import part_text, read_part
from llmprune.output.write import write_record
from llmprune.runs.announce import announce, claim_output
from llmprune.runs.texts import choose_texts
from llmprune.steps.base import Work
from llmprune.steps.channels.step import change_in_memory, changes
from llmprune.steps.weights.spreading import spread
from llmprune.steps.weights.step import PruneWeights, asked, choose, prune_weights
from llmprune.stream.source import ModelSource

FROM_FOLDER = "heads, neurons and layers are removed, budgets kept and weights rounded from folder to folder: "


def prune_in_memory(
    job: Job, model: PreTrainedModel, folder: ModelFolder | None, tokenizer: PreTrainedTokenizerBase | None, why: str
) -> tuple[RunRecord, Path | None]:
    """Prune a model in place, and save it where an output folder is named. Returns the record and that folder.

    Args:
        why: its dtype was chosen, in words; nothing where nobody chose.
    """
    if job.config.structured or job.config.budgets or job.config.bits:
        raise InputError(FROM_FOLDER + "pass the model's folder or Hub id")
    changes(job)  # or else they are refused, before anything is read or written
    output = job.output(folder.name if folder else job.config.model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("part of the model is offloaded: pass its folder or Hub id instead, with an output folder")
    check_one_device(parameter.device for parameter in model.parameters())
    if folder is None and (job.config.device, job.config.dtype) != ("auto", "auto"):
        raise InputError("a model in memory is pruned on its own device, in its own dtype: leave device and dtype out")
    if output is not None:
        claim_output(job, output, folder.path if folder else None)
    pick_device(str(model.device))
    with job.clock("prepare"):
        source = ModelSource(model)
        selection = choose(job, list(source.blocks()))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        work = Work(
            model,
            find_blocks(model),
            model.device,
            model.dtype,
            model.num_parameters(),
            size,
            source,
            scratch=Path(tempfile.gettempdir()) if job.config.activations == "disk" else None,
        )
        texts = choose_texts(job.config, model.config, tokenizer, given=job.given, bundled=bool(folder and folder.bundled))
    record = announce(
        job,
        work,
        texts,
        folder,
        title=PruneWeights.title,
        asked=selection.describe(asked(job)),
        skipped=selection.skipped,
        predicted={},
        why=why,
    )
    with _evaluating(model):
        change_in_memory(job, work, texts, selection.patterns, record)
        selection = spread(job, work, selection, texts, record, None)
        prune_weights(job, work, selection, texts, record, set())
    if output is not None and job.ranks.first:
        with published(output, overwrite=job.config.overwrite) as partial, job.clock("write"):
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            names = match_names(model, Checkpoint(partial))
            record.sites = [_on_disk(site, names) for site in record.sites]
            write_record(partial, record, output.name)
    job.ranks.agree(None)
    job.progress.summary(record, output)
    return record, output


def check_one_device(devices: Iterable[torch.device]) -> None:
    """Those of a model's parameters.

    Raises:
        InputError: there are several.
    """
    if len(found := sorted({str(device) for device in devices})) > 1:
        raise InputError(
            f"the model is spread over {', '.join(found)}: load it without device_map, or pass its folder or Hub id instead, "
            "with an output folder"
        )


def _on_disk(site: SiteRecord, names: Names) -> SiteRecord:
    """The record of a matrix of a model in memory, after the model has been saved."""
    place = locate(names[site.tensor], read_part(site.part))
    return replace(site, tensor=place.disk, part=part_text(place.part))


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode; each module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
