"""`llmprune scan`: what each matrix of a dense model loses at which sparsity, and what follows for how to spread one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from llmprune.base.errors import InputError, plain_errors, user_path
from llmprune.base.files import SCAN
from llmprune.base.folders import publish
from llmprune.base.notation import in_file_name
from llmprune.base.processes import joined
from llmprune.base.words import command_line, count
from llmprune.data.documents import GIVEN
from llmprune.data.windows import Given, Texts
from llmprune.job.allocation import as_texts
from llmprune.job.job import Job
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.job.record import RunRecord
from llmprune.job.scan import Scan, by_kind, total_weights
from llmprune.models.resolve import ModelFolder, resolve, spelled
from llmprune.models.skeleton import Skeleton, find_tokenizer
from llmprune.numerics.patterns import NM, Pattern, Unstructured, parse
from llmprune.output.resume import Manifest, continued, partial_folder
from llmprune.runs.announce import claim_output
from llmprune.runs.checks import check_folders
from llmprune.runs.schedule import Stage
from llmprune.steps.base import Load, Step, Work
from llmprune.steps.weights.allocate import ALLOCATORS
from llmprune.steps.weights.allocate.base import share
from llmprune.steps.weights.scanning import Scanner, followed
from llmprune.steps.weights.searching import kept_in
from llmprune.steps.weights.selection import select_sites

GRID: tuple[Pattern, ...] = (*(Unstructured(tenth / 10) for tenth in range(3, 10)), NM(6, 8), NM(2, 4), NM(1, 4))
PROBE = Unstructured(0.7)  # what each matrix is pruned to by itself
PROPOSED = ("50%", "60%", "70%", "2:4")


class ScanModel(Step):
    """A `Step` that leaves the model as it is."""

    title = "scan"

    def __init__(self, job: Job, skeleton: Skeleton, scratch: Path | None) -> None:
        self._job, self._work = job, Work.on_disk(skeleton, scratch)
        self._selection = select_sites(skeleton.describe(), PROBE, only=job.config.only, skip=job.config.skip)
        self.skipped: Mapping[str, str] = self._selection.skipped

    def __str__(self) -> str:
        return f"{count(len(GRID), 'pattern')} of {count(len(self._selection.patterns), 'matrix')}, each alone at {PROBE}"

    def load(self, texts: Texts) -> Load:
        return Load(probed=followed(self._selection.patterns, texts, self._job.ranks.size), scanned=len(GRID))

    def _scanner(self, texts: Texts) -> Scanner:
        return Scanner(self._job, self._work, texts, frozenset(self._selection.patterns), GRID, PROBE)

    def run(self, texts: Texts, record: RunRecord, into: Path, manifest: Manifest | None) -> None:
        """Write `scan.json`, and what each way of spreading proposes."""
        known = self._job.ranks.agree(manifest.known.get("scan", {}) if manifest else {})
        found = self._scanner(texts).scan(record, known, kept_in(manifest))
        if manifest:
            (into / SCAN).write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")
            for name, allocation in proposals(found).items():
                text = json.dumps(as_texts(allocation), indent=1) + "\n"
                (into / f"allocation-{in_file_name(name)}.json").write_text(text, encoding="utf-8")


def scan(
    model: str | Path,
    output: str | Path,
    *,
    calibration: str | Path | Given = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Scan:
    """Measure the error curves and sensitivities of a model's matrices, block by block, and write them to a folder:
    `scan.json`, and files that `--allocation` takes. Goes on from an unfinished scan.

    Args:
        model: a bundled name, a folder or a Hub id.
        calibration: as for `prune`.
        options: those of `prune` that say how to calibrate and compute.

    Raises:
        InputError: bad input, in one line; nothing has been written.
    """
    given = None if isinstance(calibration, (str, Path)) else calibration
    named = {"model": spelled(model), "calibration": str(calibration) if given is None else GIVEN}
    fixed = {**named, "output": str(output), "sparsity": str(PROBE), "method": "sparsegpt", "eval_text": "none"}
    config = PruneConfig.create({**options, **fixed})
    check_folders(config)
    with torch.no_grad(), plain_errors(), joined() as ranks:
        job = Job(config, given, progress or Progress(), ranks)
        folder, into = resolve(config.model), user_path(str(output), "output")
        claim_output(job, into, folder.path)
        with job.clock:
            return _scan(job, folder, into)


def _scan(job: Job, folder: ModelFolder, output: Path) -> Scan:
    begun = Stage(job, ScanModel, output, partial_folder(output)).begin(folder, find_tokenizer(folder.path))
    if job.ranks.first:
        with continued(output, begun.fingerprint(), job.config.restart, job.progress.note) as manifest:
            begun.step.run(begun.texts, begun.record, manifest.folder, manifest)
            publish(manifest.folder, output, overwrite=job.config.overwrite)
    else:
        begun.step.run(begun.texts, begun.record, partial_folder(output), None)
    job.ranks.agree(None)
    return Scan.load(output / SCAN)


def proposals(found: Scan) -> dict[str, Mapping[str, Pattern | None]]:
    """What `sensitivity` makes of some sparsities, where it can."""
    made: dict[str, Mapping[str, Pattern | None]] = {}
    for text in PROPOSED:
        try:
            made[text] = ALLOCATORS.get("sensitivity").allocate(found, parse(text))
        except InputError:  # a matrix that cannot have the pattern
            continue
    return made


def show(found: Scan, model: str, output: str, console: Console) -> None:
    """A table by kind of matrix, and what to do with the files; `model` as the user wrote it."""
    proposed = {text: own for text, own in proposals(found).items() if isinstance(parse(text), Unstructured)}
    table = Table(
        title=f"mean output error; nats a token lost by one matrix alone at {found.probe}; sparsity proposed by sensitivity",
        title_justify="left",
    )
    columns = ["", "error 50%", "70%", "nats, alone", *(f"for {text}" for text in proposed)]
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for kind, own in by_kind(found.matrices).items():
        errors = [sum(one.error(parse(text)) for one in own) / len(own) for text in ("50%", "70%")]
        nats = [one.nats for one in own]
        mean = [
            sum(one.weights * (1 - share(allocation[one.name])) for one in own) / total_weights(own)
            for allocation in proposed.values()
        ]
        told = (f"{min(nats):.4f}-{max(nats):.4f}", *(f"{value:.0%}" for value in mean))
        table.add_row(kind, *(f"{error:.1%}" for error in errors), *told)
    console.print(table)
    console.print(f"wrote {output}; next:", markup=False)
    place = f"{output}/{SCAN}"
    command = command_line("llmprune", "--model", model, "--sparsity", "60%", "--allocate", "sensitivity", "--scan", place)
    console.print(f"  {command}", markup=False, soft_wrap=True)
