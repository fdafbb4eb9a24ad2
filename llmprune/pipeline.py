"""The composition root: options in, pruned model and record out. The only place where the parts meet."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune import hub
from llmprune.asked import check_folders, check_names
from llmprune.config import DTYPES, PruneConfig
from llmprune.data import Given
from llmprune.errors import InputError, plain_errors, unknown
from llmprune.hardware import map_large_allocations, pick_device, pick_dtype
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks
from llmprune.models.files import read_json
from llmprune.models.names import Names, locate, match_names
from llmprune.models.resolve import EXAMPLE, ModelFolder, resolve, spelled
from llmprune.models.sites import Block, part_text, read_part
from llmprune.models.skeleton import Skeleton, load_config, load_model, load_tokenizer
from llmprune.plan import Plan, make_plan
from llmprune.preflight import describe, estimate, shortage
from llmprune.ranks import joined
from llmprune.report.card import licence, model_card
from llmprune.report.console import Progress
from llmprune.report.record import RunRecord, SiteRecord, versions
from llmprune.run import Job, Resume, Work, run
from llmprune.shell import command_line
from llmprune.shrinking import Shrinking, structure
from llmprune.sparse.loading import load_packed
from llmprune.stream.publish import (
    RECORD,
    check_output,
    check_room,
    copy_extras,
    existing_parent,
    publish,
    published,
    recover,
    settle,
    sums,
    write_json,
)
from llmprune.stream.resume import MANIFEST, Manifest, continued, partial_folder, smaller_folder
from llmprune.stream.shards import NoSink, ShardWriter
from llmprune.stream.source import CheckpointSource, ModelSource
from llmprune.texts import Texts, choose_texts
from llmprune.words import count

_LARGE_TENSOR = 4 * 2**20  # bytes
# the options of structure, for a run that has removed it
_WHOLE: dict[str, Any] = {"score": "second_order", "layer_score": "influence", "per_layer": False, "round_to": None}


@dataclass(frozen=True, slots=True)
class Result:
    """What `prune` returns.

    Attributes:
        record: what was asked, measured and written.
        model: the pruned model; None where it was streamed from one folder to another.
        output: the folder written, if any.
    """

    record: RunRecord
    model: PreTrainedModel | None
    output: Path | None


def prune(
    model: str | Path | PreTrainedModel,
    *,
    calibration: str | Path | Given = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Prune a causal language model after training.

    Args:
        model: a model in memory, which is pruned in place; or a bundled name, a folder or a Hub id. With `output`, those
            are streamed from disk to disk with one block's weights in memory; without, they are loaded whole. Heads, neurons
            and layers are removed from folder to folder only.
        calibration: the name of a text, as on the command line; or token windows: ids (windows, length), or mappings of
            `input_ids` and `attention_mask`, padding marked 0.
        tokenizer: for a model in memory and calibration text.
        progress: what to show; nothing by default.
        options: the fields of `PruneConfig`: `sparsity`, or `heads`, `neurons`, `layers`, and how.

    Raises:
        InputError: bad input, in one line; nothing has been written.
    """
    if not isinstance(model, (str, Path, PreTrainedModel)):
        raise InputError(f"model must be a transformers model, a folder or a name, not {type(model).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}")
    given = None if isinstance(calibration, (str, Path)) else calibration
    named = {
        "model": type(model).__name__ if isinstance(model, PreTrainedModel) else spelled(model),
        "calibration": str(calibration) if given is None else "given tokens",
    }
    config = PruneConfig.create({**options, **named})
    check_names(config)
    if not isinstance(model, PreTrainedModel):
        check_folders(config)
    with torch.no_grad(), plain_errors():
        with joined() as ranks:
            job = Job(config, given, progress or Progress(), ranks)
            _check_push(job)
            with job.clock:
                result = _prune(job, model, tokenizer)
        if job.ranks.first:
            _push(job, result)  # the others do not wait for it
        return result


def _prune(job: Job, model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Result:
    """By the road that suits where the model is and what is asked."""
    if isinstance(model, PreTrainedModel):
        return _prune_in_memory(job, model, None, tokenizer)
    folder = resolve(job.config.model)
    config = load_config(folder.path)
    tokenizer = tokenizer or _load_tokenizer(folder.path)
    if job.config.structured:
        return _make_smaller(job, folder, config, tokenizer)
    if job.config.output is not None:
        return _prune_folder(job, folder, config, tokenizer)
    return _prune_in_memory(job, _load_whole(folder, config, job), folder, tokenizer)


def _check_push(job: Job) -> None:
    """Refuse a push that cannot go well before the work, not after it."""
    repository = job.config.push_to_hub
    if repository is None:
        return
    if job.config.output is None:
        raise InputError(f"push_to_hub {repository} pushes the output folder: name one")
    if job.ranks.first:
        hub.check_ready(repository)


def _push(job: Job, result: Result) -> None:
    """Push the output folder, where that is asked for; it is complete, whatever comes of that."""
    repository, output = job.config.push_to_hub, result.output
    if repository is None or output is None:
        return
    try:
        job.progress.note(f"pushed: {hub.push(output, repository, tell=job.progress.note)}")
    except InputError as error:
        later = command_line("llmprune", "push", output, repository)
        raise type(error)(f"{error}; {output} is complete, and `{later}` pushes it later") from None


def _check_output(job: Job, output: Path, model: Path | None) -> None:
    """Refuse an output folder that would cost the user something, after the first process has put it right."""
    if job.ranks.first:
        recover(output)
    job.ranks.agree(None)
    check_output(output, model, job.config.overwrite)


def _make_smaller(job: Job, folder: ModelFolder, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> Result:
    """Remove heads, neurons and layers; prune weights of what is left, if a pattern is asked for."""
    output = job.output(folder.name)
    if output is None:
        raise InputError("heads, neurons and layers are removed from folder to folder: name an output folder")
    _check_output(job, output, folder.path)
    with job.clock("prepare"):
        skeleton = _skeleton(job, folder, config)
        work = _streamed(job, skeleton, Plan({}, {}), output)
        texts = choose_texts(job.config, config, tokenizer, given=job.given, bundled=folder.bundled)
        shrinking = Shrinking(job, skeleton, texts, work.scratch)
        if job.pattern:
            make_plan(shrinking.trial.describe(), job.pattern, only=job.config.only, skip=job.config.skip)
        predicted = _predict(job, work, config, skeleton.describe(), texts, output, probed=shrinking.probed())
    record = _announce(job, work, texts, folder, predicted, "structure", str(shrinking))
    with _continued(job, output, _fingerprint(job, skeleton.checkpoint, texts, record)) as manifest:
        if job.pattern is not None:
            record = _smaller(job, folder, skeleton, shrinking, record, output, manifest)
            rest = replace(job.config, output=str(output), heads=None, neurons=None, layers=None, target_params=None, **_WHOLE)
            then, between = Job(rest, job.given, job.progress, job.ranks, job.clock), smaller_folder(output)
            whole = replace(folder, path=between)
            return _prune_folder(then, whole, load_config(between), tokenizer, earlier=record, manifest=manifest)
        _shrink(job, folder, skeleton, shrinking, record, manifest.folder if manifest else None, output.name)
        if manifest:
            publish(manifest.folder, output, overwrite=job.config.overwrite)
    job.ranks.agree(None)
    job.progress.summary(record, output)
    return Result(record, None, output)


def _smaller(
    job: Job,
    folder: ModelFolder,
    skeleton: Skeleton,
    shrinking: Shrinking,
    record: RunRecord,
    output: Path,
    manifest: Manifest | None,
) -> RunRecord:
    """Make the smaller model on the way to `output`, unless an earlier run of the same command has; returns its record."""
    between = smaller_folder(output)
    if job.ranks.agree((between / RECORD).is_file()):
        job.progress.note("the smaller model is there from an earlier run")
        return RunRecord.read(read_json(between / RECORD))
    if manifest:
        between.mkdir(mode=0o700, exist_ok=True)
    _shrink(job, folder, skeleton, shrinking, record, between if manifest else None, output.name)
    if manifest:
        settle(between)
        manifest.begin()
    job.ranks.agree(None)
    return record


def _shrink(
    job: Job, folder: ModelFolder, skeleton: Skeleton, shrinking: Shrinking, record: RunRecord, into: Path | None, name: str
) -> None:
    """Stream the model's smaller one into a folder, on the process that writes, and fill in the record."""
    scouted = shrinking.scout()
    decision = shrinking.decide(scouted)
    writer = ShardWriter(decision.target, into, set(decision.target.names)) if into else None
    record.dense, record.pruned = scouted.dense, shrinking.stream(decision, writer or NoSink())
    record.removals = shrinking.removals
    record.structure = structure(decision, scouted, skeleton)
    record.peak_memory = job.clock.peaks()
    if into and writer:
        with job.clock("write"):
            writer.finish()
            copy_extras(folder.path, into)
            smaller = decision.target.config
            smaller.dtype, smaller.architectures = load_config(folder.path).dtype, [record.structure["architecture"]]
            smaller.save_pretrained(into)
            _write_record(into, record, name)


def _skeleton(job: Job, folder: ModelFolder, config: PretrainedConfig) -> Skeleton:
    checkpoint, device = Checkpoint(folder.path), pick_device(job.config.device, job.ranks.local)
    if checkpoint.largest() > _LARGE_TENSOR:
        map_large_allocations()
    return Skeleton(checkpoint, config, device, pick_dtype(job.config.dtype, device, config))


def _streamed(job: Job, skeleton: Skeleton, plan: Plan, output: Path) -> Work:
    return Work(
        skeleton.model,
        skeleton.blocks,
        skeleton.device,
        skeleton.dtype,
        skeleton.parameters(),
        skeleton.checkpoint.nbytes(),
        CheckpointSource(skeleton),
        plan,
        skeleton.outside,
        skeleton.names,
        existing_parent(output) if job.config.activations == "disk" else None,
    )


def _prune_folder(
    job: Job,
    folder: ModelFolder,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    earlier: RunRecord | None = None,
    manifest: Manifest | None = None,
) -> Result:
    """Stream a checkpoint folder to the output folder.

    Args:
        earlier: the record of what made the model smaller before, under the same `manifest`.
    """
    output = job.output(folder.name)
    assert output is not None
    assert job.pattern is not None
    if earlier is None:
        _check_output(job, output, folder.path)
    with job.clock("prepare"):
        skeleton = _skeleton(job, folder, config)
        checkpoint, blocks = skeleton.checkpoint, skeleton.describe()
        plan = make_plan(blocks, job.pattern, only=job.config.only, skip=job.config.skip)
        work = _streamed(job, skeleton, plan, output)
        texts = choose_texts(job.config, config, tokenizer, given=job.given, bundled=folder.bundled)
        predicted = _predict(job, work, config, blocks, texts, output)
    record = _announce(job, work, texts, folder, predicted, "pattern", _pattern(job, work))
    unfinished = nullcontext(manifest) if earlier else _continued(job, output, _fingerprint(job, checkpoint, texts, record))
    with unfinished as manifest:
        partial, finished = job.ranks.agree((manifest.folder, manifest.blocks) if manifest else (output, []))
        if finished:
            job.clock.add(finished[-1]["seconds"])
        if manifest:
            copy_extras(folder.path, partial)
        edited: set[str] = set()
        writer = ShardWriter(skeleton, partial, edited)
        run(job, work, texts, writer if manifest else NoSink(), record, edited, Resume(finished, writer, manifest))
        if manifest:
            with job.clock("write"):
                writer.finish()
                if earlier:
                    _continue(record, earlier)
                _write_record(partial, record, output.name)
            publish(partial, output, overwrite=job.config.overwrite)
    job.ranks.agree(None)  # the output is there when any process returns
    job.progress.summary(record, output)
    return Result(record, None, output)


def _predict(
    job: Job, work: Work, config: PretrainedConfig, blocks: Sequence[Block], texts: Texts, output: Path, *, probed: int = 0
) -> dict[str, Any]:
    """What the run will need, by formula, for the record.

    Raises:
        InputError: the disk has too little room for it.
    """
    needs = estimate(
        config,
        blocks,
        texts,
        job.recipe,
        dtype=work.dtype,
        batch=max(job.config.batch_size // job.ranks.size, 1),
        checkpoint=work.nbytes,
        processes=job.ranks.size,
        probed=probed,
        all_experts=job.config.all_experts,
    )
    mapped = job.config.activations == "disk"
    kept = sum(path.stat().st_size for path in partial_folder(output).glob("*.safetensors"))  # by an earlier run
    check_room(output, needs.output - kept + (needs.activations * job.ranks.size if mapped else 0))
    seconds = needs.seconds(work.device, work.dtype)
    text, short = describe(needs, seconds, mapped=mapped), shortage(needs, work.device, mapped=mapped)
    return asdict(needs) | {"seconds": seconds, "text": text} | ({"short": short} if short else {})


def _continue(record: RunRecord, earlier: RunRecord) -> None:
    """Let the record start where `earlier`, of what made the model smaller, did."""
    record.dense, record.removals, record.structure = earlier.dense, earlier.removals, earlier.structure
    record.arguments, record.model = earlier.arguments, earlier.model
    record.recipe["text"] = earlier.recipe["text"]
    record.size["bytes_before"] = earlier.size["bytes_before"]


def _continued(job: Job, output: Path, fingerprint: Mapping[str, Any]) -> AbstractContextManager[Manifest | None]:
    """The manifest of the run, which the first process keeps; none on the others."""
    if not job.ranks.first:
        return nullcontext()
    return continued(output, fingerprint, restart=job.config.restart, tell=job.progress.note)


def _fingerprint(job: Job, checkpoint: Checkpoint, texts: Texts, record: RunRecord) -> dict[str, Any]:
    """All that decides the result, in terms that a message can show."""
    passing = {"model", "output", "overwrite", "restart", "activations", "calibration", "eval_text", "push_to_hub"}
    options = {f"--{name.replace('_', '-')}": value for name, value in asdict(job.config).items() if name not in passing}
    windows = {"calibration text": texts.calibration, "evaluation text": texts.evaluation}
    return {
        **options,
        **{f"version of {package}": version for package, version in versions().items()},
        **{what: text.digest() if text else None for what, text in windows.items()},
        "model": checkpoint.fingerprint(),
        "compute": f"{record.compute['dtype']} on {record.compute['device']}",
        "processes": job.ranks.size,
    }


def _prune_in_memory(
    job: Job, model: PreTrainedModel, folder: ModelFolder | None, tokenizer: PreTrainedTokenizerBase | None
) -> Result:
    """Prune a model in place, and save it where an output folder is named."""
    if job.config.structured or job.pattern is None:
        raise InputError("heads, neurons and layers are removed from folder to folder: pass the model's folder or Hub id")
    output = job.output(folder.name if folder else job.config.model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("part of the model is offloaded: pass its folder or Hub id instead, with an output folder")
    if folder is None and (job.config.device, job.config.dtype) != ("auto", "auto"):
        raise InputError("a model in memory is pruned on its own device, in its own dtype: leave device and dtype out")
    if output is not None:
        _check_output(job, output, folder.path if folder else None)
    pick_device(str(model.device))
    with job.clock("prepare"):
        source = ModelSource(model)
        plan = make_plan(list(source.blocks()), job.pattern, only=job.config.only, skip=job.config.skip)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        work = Work(
            model,
            find_blocks(model),
            model.device,
            model.dtype,
            model.num_parameters(),
            size,
            source,
            plan,
            scratch=Path(tempfile.gettempdir()) if job.config.activations == "disk" else None,
        )
        texts = choose_texts(job.config, model.config, tokenizer, given=job.given, bundled=bool(folder and folder.bundled))
    record = _announce(job, work, texts, folder, {}, "pattern", _pattern(job, work))
    with _evaluating(model):
        run(job, work, texts, NoSink(), record, set())
    if output is not None and job.ranks.first:
        with published(output, overwrite=job.config.overwrite) as partial, job.clock("write"):
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            names = match_names(model, Checkpoint(partial))
            record.sites = [_on_disk(site, names) for site in record.sites]
            _write_record(partial, record, output.name)
    job.ranks.agree(None)
    job.progress.summary(record, output)
    return Result(record, model, output)


def _on_disk(site: SiteRecord, names: Names) -> SiteRecord:
    """The record of a matrix of a model in memory, after the model has been saved."""
    place = locate(names[site.tensor], read_part(site.part))
    return replace(site, tensor=place.disk, part=part_text(place.part))


def _pattern(job: Job, work: Work) -> str:
    return f"{job.pattern} in {count(len(work.plan.patterns), 'matrix')}, {len(work.plan.skipped)} left out"


def _announce(
    job: Job, work: Work, texts: Texts, folder: ModelFolder | None, predicted: dict[str, Any], what: str, asked: str
) -> RunRecord:
    """Start the record, and show what is about to be done."""
    windows, config = texts.calibration, job.config
    record = RunRecord(
        arguments=asdict(config),
        recipe=asdict(job.recipe) | {"text": job.method()},
        model={
            "name": folder.name if folder else config.model,
            "hub_id": folder.hub_id if folder else None,
            "commit": folder.commit if folder else None,
            "license": licence(folder.path) if folder else {},
            "class": type(work.model).__name__,
            "parameters": work.parameters,
            "blocks": len(work.blocks),
        },
        calibration={
            "text": windows.text,
            "samples": windows.ids.shape[0],
            "seqlen": windows.ids.shape[1],
            "tokens": windows.tokens(),
            "seed": config.seed,
        },
        compute={
            "device": str(work.device),
            "dtype": str(work.dtype).removeprefix("torch."),
            "processes": job.ranks.size,
        },
        predicted=predicted,
        skipped=work.plan.skipped,
        seconds=job.clock.seconds,
        phase_memory=job.clock.memory,
        size={"bytes_before": work.nbytes},
    )
    job.clock.device = work.device
    job.progress.header(record, what, asked)
    if folder and folder.bundled:
        size = f"{work.parameters / 1e6:.0f}M-parameter demo"
        job.progress.note(f"llama is the bundled {size}; for a real model pass a Hub id such as {EXAMPLE}{folder.shadowed}")
    if apart := [name for name, why in record.skipped.items() if why.endswith("of no linear layer")]:
        job.progress.note(f"left alone: {count(len(apart), 'weight')} of no linear layer (fused experts?), such as {apart[0]}")
    for note in (*texts.notes, *([predicted["short"]] if "short" in predicted else [])):
        job.progress.note(note)
    return record


def _write_record(folder: Path, record: RunRecord, name: str) -> None:
    """Add the model card, and last the record with the sums of all other files. The card names the repository, if any."""
    (folder / "README.md").write_text(model_card(record, record.arguments["push_to_hub"] or name), encoding="utf-8")
    record.size["bytes_after"] = Checkpoint(folder).nbytes()
    record.files = sums(folder, MANIFEST)
    write_json(folder / RECORD, record.as_dict())


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None where it has none (calibration may come as tokens)."""
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None
    return load_tokenizer(folder)


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


def _load_whole(folder: ModelFolder, config: PretrainedConfig, job: Job) -> PreTrainedModel:
    device = pick_device(job.config.device, job.ranks.local)
    return load_model(folder.path, config, device, pick_dtype(job.config.dtype, device, config))


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    dense: bool = False,
    check: bool = True,
) -> PreTrainedModel:
    """A model that llmprune wrote, or any other: a bundled name, a folder or a Hub id, in eval mode.

    Linear layers that are 2:4, in a packed folder or a dense one, become `Sparse24Linear`: packed in memory, for inference. On
    a CPU that saves memory and costs time. What stays dense in the blocks is listed in a warning. Models without such
    layers load as `from_pretrained` loads them; needed, too, where `--per-layer` made layers of different sizes.

    Args:
        device: `auto` is CUDA where there is one, else the CPU.
        dtype: `auto` is the checkpoint's own.
        dense: leave or make all layers dense.
        check: compare a packed folder's weights with the sums in its `packed.json`, which reads them once more: a quarter
            to a third of the time that loading takes otherwise, on one CPU core.

    Raises:
        InputError: it cannot be loaded, in one line.
    """
    with plain_errors("free some, or load on another device"):
        folder = resolve(spelled(model))
        config, where = load_config(folder.path), pick_device(device)
        compute = _dtype(dtype, where, config)
        packed = load_packed(folder.path, config, where, compute, dense=dense, check=check)
        return packed if packed is not None else load_model(folder.path, config, where, compute)


def _dtype(name: str | torch.dtype, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return config.dtype if name == "auto" and isinstance(config.dtype, torch.dtype) else pick_dtype(name, device, config)
