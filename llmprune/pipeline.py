"""The composition root: options in, pruned model and record out. The only place where the parts meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune import solvers
from llmprune.config import PruneConfig
from llmprune.data import Given, Windows
from llmprune.errors import InputError, plain_errors, reason, user_path
from llmprune.evaluate.perplexity import streamed_perplexity
from llmprune.hardware import map_large_allocations, peak_memory, pick_device, pick_dtype
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks
from llmprune.models.experts import observable
from llmprune.models.names import Names, locate, match_names
from llmprune.models.resolve import EXAMPLE, ModelFolder, resolve
from llmprune.models.sites import Block, part_text, read_part
from llmprune.models.skeleton import FOREIGN, Skeleton, load_config
from llmprune.patterns import Pattern, parse
from llmprune.plan import Plan, make_plan
from llmprune.pruner import Pruner
from llmprune.ranks import Ranks, joined
from llmprune.recipes import Recipe, choose_recipe
from llmprune.reconstruct import check_batches
from llmprune.report.card import model_card
from llmprune.report.console import Progress
from llmprune.report.record import Clock, RunRecord, SiteRecord, versions
from llmprune.stream.activations import Activations
from llmprune.stream.engine import Sink, Source, stream
from llmprune.stream.publish import RECORD, check_output, copy_extras, publish, published, sha256, write_json
from llmprune.stream.resume import MANIFEST, Manifest, continued
from llmprune.stream.shards import NoSink, ShardWriter
from llmprune.stream.source import CheckpointSource, ModelSource
from llmprune.texts import Texts, choose_texts

_LARGE_TENSOR = 4 * 2**20  # bytes


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
            are streamed from disk to disk with one block's weights in memory; without, they are loaded whole.
        calibration: the name of a text, as on the command line; or token windows: ids (windows, length), or mappings of
            `input_ids` and `attention_mask`, padding marked 0.
        tokenizer: for a model in memory and calibration text.
        progress: what to show; nothing by default.
        options: the fields of `PruneConfig`; `sparsity` is required.

    Raises:
        InputError: bad input, in one line; nothing has been written.
    """
    if not isinstance(model, (str, Path, PreTrainedModel)):
        raise InputError(f"model must be a transformers model, a folder or a name, not {type(model).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}")
    given = None if isinstance(calibration, (str, Path)) else calibration
    named = {
        "model": type(model).__name__ if isinstance(model, PreTrainedModel) else str(model),
        "calibration": str(calibration) if given is None else "given tokens",
    }
    config = PruneConfig.create({**options, **named})
    with torch.no_grad(), plain_errors(), joined() as ranks:
        job = _Job(config, given, progress or Progress(), ranks)
        if isinstance(model, PreTrainedModel):
            return _prune_in_memory(job, model, None, tokenizer)
        folder = resolve(job.config.model)
        model_config = load_config(folder.path)
        tokenizer = tokenizer or _load_tokenizer(folder.path)
        if job.config.output is not None:
            return _prune_folder(job, folder, model_config, tokenizer)
        return _prune_in_memory(job, _load_whole(folder, model_config, job), folder, tokenizer)


@dataclass(slots=True)
class _Job:
    """What was asked. Method and pattern are looked up at once, so that a mistake costs no work."""

    config: PruneConfig
    given: Given | None
    progress: Progress
    ranks: Ranks
    clock: Clock = field(default_factory=Clock)
    recipe: Recipe = field(init=False)
    pattern: Pattern = field(init=False)

    def __post_init__(self) -> None:
        self.recipe, self.pattern = choose_recipe(self.config), parse(self.config.sparsity)
        solvers.load(self.recipe.method)

    def output(self, model: str) -> Path | None:
        """The folder to write; `auto` names it after the model, the pattern and the method."""
        if self.config.output != "auto":
            return None if self.config.output is None else user_path(self.config.output, "output")
        pattern = str(self.pattern).replace(":", "of").replace("%", "pct")
        return Path(f"{model}-{pattern}-{self.recipe.name}")


@dataclass(frozen=True, slots=True)
class _Work:
    """The model that a job works on, on disk or in memory alike.

    Attributes:
        outside: makes what is outside the blocks (embeddings, head) available for a while.
        names: where on disk the model's tensors are; nothing for a model in memory.
    """

    model: PreTrainedModel
    blocks: Mapping[str, nn.Module]
    device: torch.device
    dtype: torch.dtype
    parameters: int
    nbytes: int
    source: Source
    plan: Plan
    outside: Callable[[], AbstractContextManager[None]] = nullcontext
    names: Names = field(default_factory=dict)


def _prune_folder(
    job: _Job, folder: ModelFolder, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Result:
    """Stream a checkpoint folder to the output folder."""
    output = job.output(folder.name)
    assert output is not None
    check_output(output, folder.path, job.config.overwrite)
    with job.clock("prepare"):
        checkpoint, device = Checkpoint(folder.path), pick_device(job.config.device, job.ranks.local)
        if checkpoint.largest() > _LARGE_TENSOR:
            map_large_allocations()
        skeleton = Skeleton(checkpoint, config, device, pick_dtype(job.config.dtype, device, config))

        work = _Work(
            skeleton.model,
            skeleton.blocks,
            device,
            skeleton.dtype,
            skeleton.parameters(),
            checkpoint.nbytes(),
            CheckpointSource(skeleton),
            make_plan(skeleton.describe(), job.pattern, only=job.config.only, skip=job.config.skip),
            skeleton.outside,
            skeleton.names,
        )
        texts = choose_texts(job.config, config, tokenizer, given=job.given, bundled=folder.bundled)
    record = _announce(job, work, texts, folder)
    with _continued(job, output, _fingerprint(job, checkpoint, texts, record)) as manifest:
        partial, finished = job.ranks.agree((manifest.folder, manifest.blocks) if manifest else (output, []))
        if finished:
            job.clock.add(finished[-1]["seconds"])
        if manifest:
            copy_extras(folder.path, partial)
        edited: set[str] = set()
        writer = ShardWriter(skeleton, partial, edited)
        _run(job, work, texts, writer if manifest else NoSink(), record, edited, _Resume(finished, writer, manifest))
        if manifest:
            with job.clock("write"):
                writer.finish()
                _write_record(partial, record, output.name)
            publish(partial, output, overwrite=job.config.overwrite)
    job.ranks.agree(None)  # the output is there when any process returns
    job.progress.summary(record, output)
    return Result(record, None, output)


def _continued(job: _Job, output: Path, fingerprint: Mapping[str, Any]) -> AbstractContextManager[Manifest | None]:
    """The manifest of the run, which the first process keeps; none on the others."""
    if not job.ranks.first:
        return nullcontext()
    return continued(output, fingerprint, restart=job.config.restart, tell=job.progress.note)


@dataclass(frozen=True, slots=True)
class _Resume:
    """What came of the blocks that an earlier run finished, where they are, and where to commit those that come."""

    finished: Sequence[Mapping[str, Any]]
    writer: ShardWriter
    manifest: Manifest | None

    def has(self, block: Block) -> bool:
        return block.index < len(self.finished)


def _fingerprint(job: _Job, checkpoint: Checkpoint, texts: Texts, record: RunRecord) -> dict[str, Any]:
    """All that decides the result, in terms that a message can show."""
    passing = {"model", "output", "overwrite", "restart", "calibration", "eval_text"}
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
    job: _Job, model: PreTrainedModel, folder: ModelFolder | None, tokenizer: PreTrainedTokenizerBase | None
) -> Result:
    """Prune a model in place, and save it where an output folder is named."""
    output = job.output(folder.name if folder else job.config.model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("part of the model is offloaded: pass its folder or Hub id instead, with an output folder")
    if folder is None and (job.config.device, job.config.dtype) != ("auto", "auto"):
        raise InputError("a model in memory is pruned on its own device, in its own dtype: leave device and dtype out")
    if output is not None:
        check_output(output, folder.path if folder else None, job.config.overwrite)
    with job.clock("prepare"):
        source = ModelSource(model)
        plan = make_plan(list(source.blocks()), job.pattern, only=job.config.only, skip=job.config.skip)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        work = _Work(model, find_blocks(model), model.device, model.dtype, model.num_parameters(), size, source, plan)
        texts = choose_texts(job.config, model.config, tokenizer, given=job.given, bundled=bool(folder and folder.bundled))
    record = _announce(job, work, texts, folder)
    with _evaluating(model):
        _run(job, work, texts, NoSink(), record, set())
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


def _run(
    job: _Job, work: _Work, texts: Texts, sink: Sink, record: RunRecord, edited: set[str], resume: _Resume | None = None
) -> None:
    """Stream the model block by block, and fill in what was found; `edited` learns what was changed."""
    clock, ranks, blocks = job.clock, job.ranks, list(work.blocks.values())
    batch = max(job.config.batch_size // ranks.size, 1)

    def record_activations(windows: Windows) -> Activations:
        return Activations.record(work.model, blocks, windows, batch=batch, device=work.device)

    evaluation = texts.evaluation.share(ranks.rank, ranks.size) if texts.evaluation else None
    with work.outside(), clock("capture"):
        feed = record_activations(texts.calibration.share(ranks.rank, ranks.size))
        dense = record_activations(evaluation) if evaluation else None
    pruned = dense.fork() if dense else None
    if job.recipe.reconstruct:
        check_batches(feed, ranks)
    pruner = Pruner(
        work.plan.patterns,
        job.recipe,
        feed,
        feed.fork() if job.recipe.reconstruct or job.recipe.target == "corrected" else None,
        texts.calibration.tokens(),
        job.config.true_sequential,
        len(blocks) - 1,
        job.progress,
        clock,
        ranks,
        work.names,
        edited,
    )

    def visit(block: Block) -> None:
        if dense is not None:
            with clock("evaluate"):
                dense.advance(block)
        if resume and resume.has(block):
            pruner.repeat(block, resume.finished[block.index], resume.writer.restore)
        else:
            pruner.prune(block)

    job.progress.start(len(blocks), len(work.plan.patterns))
    with observable(work.model, all_tokens=job.config.all_experts):
        stream(
            work.source, _Feeds(feed, pruned, len(blocks) - 1, job.progress, clock), _Keeper(sink, clock, pruner, resume), visit
        )
    if thin := [site for site in pruner.records if site.notes.get("pool_share", 0) > 0.5]:
        least = min(thin, key=lambda site: site.tokens)
        job.progress.note(
            f"{len(thin)} expert matrices saw fewer tokens than they have inputs ({least.name}: {least.tokens}) and lean on "
            "all experts' statistics; more --samples or --all-experts give them their own"
        )
    if not pruner.records:
        raise InputError("nothing was pruned: the model's forward runs none of the chosen sites")
    if evaluation and dense and pruned:
        with work.outside(), clock("evaluate"):
            record.dense = streamed_perplexity(work.model, blocks, dense, evaluation, work.device, ranks)
            record.pruned = streamed_perplexity(work.model, blocks, pruned, evaluation, work.device, ranks)
    record.sites, record.reconstructions = pruner.records, pruner.reconstructions
    record.skipped |= dict.fromkeys(pruner.uncalled, "the model's forward never runs it")
    record.size["nonzero_before"], record.size["nonzero_after"] = pruner.nonzero
    record.peak_memory = peak_memory(work.device)


@dataclass(frozen=True, slots=True)
class _Feeds:
    """Advances the calibration stream, up to the inputs of the `last` block, and the pruned evaluation stream, if any."""

    calibration: Activations
    evaluation: Activations | None
    last: int
    progress: Progress
    clock: Clock

    def advance(self, block: Block) -> None:
        if block.index < self.last:
            with self.clock("forward"):
                self.calibration.advance(block)
        if self.evaluation is not None:
            with self.clock("evaluate"):
                self.evaluation.advance(block)
        self.progress.block(block.index)


@dataclass(frozen=True, slots=True)
class _Keeper:
    """Keeps each block, unless an earlier run did, and commits what came of it."""

    sink: Sink
    clock: Clock
    pruner: Pruner
    resume: _Resume | None

    def put(self, block: Block) -> None:
        if self.resume and self.resume.has(block):
            return
        with self.clock("write"):
            self.sink.put(block)
            if self.resume and self.resume.manifest:
                report = self.pruner.report(block) | {"seconds": self.clock.seconds}
                self.resume.manifest.commit(self.resume.writer.shard(block), report)


def _announce(job: _Job, work: _Work, texts: Texts, folder: ModelFolder | None) -> RunRecord:
    """Start the record, and show what is about to be done."""
    windows, config = texts.calibration, job.config
    record = RunRecord(
        arguments=asdict(config),
        recipe=asdict(job.recipe) | {"text": str(job.recipe)},
        model={
            "name": folder.name if folder else config.model,
            "hub_id": folder.hub_id if folder else None,
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
        skipped=work.plan.skipped,
        seconds=job.clock.seconds,
        size={"bytes_before": work.nbytes},
    )
    job.progress.header(record, str(job.pattern), len(work.plan.patterns))
    if folder and folder.bundled:
        size = f"{work.parameters / 1e6:.0f}M-parameter demo"
        shadowed = " (a folder here of that name is ./llama)" if Path(config.model).is_dir() else ""
        job.progress.note(f"llama is the bundled {size}; for a real model pass a Hub id such as {EXAMPLE}{shadowed}")
    if apart := [name for name, why in record.skipped.items() if why.endswith("of no linear layer")]:
        job.progress.note(f"{len(apart)} weights of no linear layer (fused experts?) are left alone, such as {apart[0]}")
    for note in texts.notes:
        job.progress.note(note)
    return record


def _write_record(folder: Path, record: RunRecord, name: str) -> None:
    """Add the model card, and last the record with the sums of all other files."""
    (folder / "README.md").write_text(model_card(record, name), encoding="utf-8")
    record.size["bytes_after"] = Checkpoint(folder).nbytes()
    record.files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    write_json(folder / RECORD, record.as_dict())


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None where it has none (calibration may come as tokens)."""
    if not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except FOREIGN as error:
        raise InputError(f"cannot read the tokenizer in {folder}: {reason(error)}") from None


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


def _load_whole(folder: ModelFolder, model_config: PretrainedConfig, job: _Job) -> PreTrainedModel:
    checkpoint, device = Checkpoint(folder.path), pick_device(job.config.device, job.ranks.local)
    dtype = pick_dtype(job.config.dtype, device, model_config)
    Skeleton(checkpoint, model_config, torch.device("cpu"), dtype)  # raises unless tensors and configuration fit together
    return AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, device_map={"": device}, trust_remote_code=False)
