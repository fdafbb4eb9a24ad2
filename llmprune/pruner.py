"""The visitor that prunes weights: collect what a stage's inputs say, solve its matrices, write them back, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune import solvers
from llmprune.errors import InputError
from llmprune.linalg import masked_least_squares
from llmprune.models.names import Names, Piece, locate
from llmprune.models.sites import Block, Site, part_text
from llmprune.patterns import Pattern, Stacked, verify
from llmprune.recipes import Recipe
from llmprune.reconstruct import reconstruct
from llmprune.report.console import Progress
from llmprune.report.record import Clock, Reconstruction, SiteRecord
from llmprune.solvers.base import Solution
from llmprune.stats import Cross, Gram, InputSample, Statistic, lean_on_pool
from llmprune.stream.activations import Activations, Beside, Stage

_ERROR_TOKENS = 2048  # calibration tokens that output errors are measured on
_STACK = 4  # rows a column up to which a stage is solved as one matrix: beyond, only memory would grow
# weights and Grams of experts that are solved at once: on a CPU as many as stay in its cache, beyond which it gets slower
_BATCH_BYTES = {"cpu": 2**22, "cuda": 2**28}
BLEND = 0.5  # how far the corrected target goes from the dense weights


@dataclass(frozen=True, slots=True)
class Observed:
    """What is kept of a stage's inputs: the solver's statistic, a sample to measure errors on, and the dense inputs'
    product with them where the target is corrected."""

    statistic: Statistic
    sample: InputSample
    cross: Cross | None
    clock: Clock

    def add(self, x: Tensor, dense: Tensor | None) -> None:
        with self.clock("statistics"):
            self.statistic.add(x)
            self.sample.add(x)
            if self.cross is not None:
                if dense is None or dense.shape != x.shape:
                    raise InputError("the dense and the pruned model send it different tokens (experts?); use --target dense")
                self.cross.add(x, dense)

    def aim(self, w: Tensor) -> Tensor:
        """The weights to imitate on the pruned model's inputs."""
        if self.cross is None:
            return w
        assert isinstance(self.statistic, Gram)
        return self.cross.aim(w, self.statistic, BLEND)


Batch = list[tuple[list[Site], Observed]]  # matrices of one shape and pattern; those of a list are stacked


@dataclass(slots=True)
class Pruner:
    """Prunes one block after the other.

    Attributes:
        patterns: site name -> pattern; other sites are left alone.
        feed: the calibration tokens as the pruned model sees them.
        dense: the same as the dense model sees them, where the recipe asks for it; advanced here.
        tokens: calibration tokens in `feed`.
        true_sequential: solve each stage on inputs that the stages before it, already pruned, put out.
        last: index of the model's last block: what it puts out is only needed where the recipe fits it.
        names: where on disk the model's tensors are; those that are not in it are called there as here.
        edited: parameters that were changed, by full name in the model.
        records: one a pruned matrix, in the order solved.
        reconstructions: one a block that was fitted.
        uncalled: sites that the model's forward never runs.
        nonzero: weights that are not zero in the matrices pruned so far, before and after.
    """

    patterns: Mapping[str, Pattern]
    recipe: Recipe
    feed: Activations
    dense: Activations | None
    tokens: int
    true_sequential: bool
    last: int
    progress: Progress
    clock: Clock
    names: Names
    edited: set[str]
    records: list[SiteRecord] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    nonzero: tuple[int, int] = (0, 0)

    def prune(self, block: Block) -> None:
        """Solve the block's planned sites, stage by stage or all from one pass; then fit the block, if asked to.

        Raises:
            InputError: inputs or weights are not finite, or the solver cannot work with them; the site is named.
        """
        reference = block.copy() if self.dense is not None else None
        groups = self._groups(block)
        onward = self.recipe.reconstruct or block.index < self.last  # whether the dense block's outputs are of use
        beside: Beside | None = None
        masks: dict[str, Tensor] = {}
        for group in groups:
            if self.dense is not None and reference is not None and self.recipe.target == "corrected":
                beside = Beside(self.dense, reference, advance=onward and group is groups[-1])
            with self.clock("forward"):
                observed = self.feed.collect(block, group, self._observe, beside)
            for stage, seen in zip(group, observed, strict=True):
                if not seen.statistic.finite():
                    names = ", ".join(site.name for site in stage)
                    raise InputError(f"the inputs of {names} hold NaN or infinity; try --dtype float32")
            _lean(group, observed)
            for batch in self._batches(group, observed):
                masks |= self._solve_batch(block, batch)
        if self.dense is None or reference is None:
            return
        if onward and beside is None:
            with self.clock("forward"):
                self.dense.advance(reference)
        if masks and self.recipe.reconstruct:
            self._reconstruct(block, masks, self.dense)

    def report(self, block: Block) -> dict[str, Any]:
        """What came of a block that was pruned, for `repeat`."""
        return {
            "sites": [asdict(record) for record in self.records if record.block == block.index],
            "reconstructions": [asdict(one) for one in self.reconstructions if one.block == block.index],
            "uncalled": [site.name for site in block.sites if site.name in set(self.uncalled)],
            "nonzero": self.nonzero,
        }

    def repeat(self, block: Block, report: Mapping[str, Any], restore: Callable[[Block], None]) -> None:
        """Instead of `prune`, for a block that an earlier run has pruned: `restore` gives it the weights of then."""
        reference = block.copy() if self.dense is not None else None
        restore(block)
        if self.dense is not None and reference is not None and (self.recipe.reconstruct or block.index < self.last):
            with self.clock("forward"):
                self.dense.advance(reference)
        self.records += [SiteRecord(**{**site, "shape": tuple(site["shape"])}) for site in report["sites"]]
        self.reconstructions += [Reconstruction(**one) for one in report["reconstructions"]]
        self.uncalled += report["uncalled"]
        self.nonzero = tuple(report["nonzero"])

    def _groups(self, block: Block) -> list[list[Stage]]:
        """The planned sites by stage; stages in one group are solved from one pass."""
        with self.clock("forward"):
            traced = self.feed.stages(block)
        called = {site.name for stage in traced for site in stage}
        self.uncalled += [site.name for site in block.sites if site.name not in called]
        planned = ([site for site in stage if site.name in self.patterns] for stage in traced)
        stages: list[Stage] = [stage for stage in planned if stage]
        if not self.true_sequential:
            return [stages] if stages else []
        groups: dict[str, list[Stage]] = {}  # experts that are fed from the same hidden states share a pass
        for stage in stages:
            groups.setdefault(stage[0].pool or stage[0].name, []).append(stage)
        return list(groups.values())

    def _observe(self, stage: Stage, device: torch.device) -> Observed:
        columns = stage[0].columns
        corrected = self.recipe.target == "corrected" and not stage[0].pool  # the two streams choose different experts
        kind: type[Statistic] = solvers.load(self.recipe.method).statistic
        if self.recipe.target == "corrected" or self.recipe.refit:
            kind = Gram
        sample = InputSample(self.tokens // _ERROR_TOKENS)
        return Observed(kind(columns, device), sample, Cross(columns, device) if corrected else None, self.clock)

    def _batches(self, group: Sequence[Stage], observed: Sequence[Observed]) -> list[Batch]:
        """What is solved at once: a stage's small matrices as one, and experts' matrices of one shape in a batch."""
        entries = [(stack, seen) for stage, seen in zip(group, observed, strict=True) for stack in self._stacks(stage)]
        alike: dict[object, Batch] = {}
        for stack, seen in entries:
            alone = not (stack[0].pool and solvers.load(self.recipe.method).batched)
            shapes = tuple((site.rows, self.patterns[site.name]) for site in stack)
            alike.setdefault(stack[0].name if alone else (stack[0].pool, shapes), []).append((stack, seen))
        batches = []
        for batch in alike.values():
            rows, columns = sum(site.rows for site in batch[0][0]), batch[0][0][0].columns
            device = batch[0][0][0].weight.device.type
            most = max(_BATCH_BYTES.get(device, 0) // (4 * columns * (columns + rows)), 1)
            batches += [batch[first : first + most] for first in range(0, len(batch), most)]
        return batches

    def _stacks(self, stage: Stage) -> list[list[Site]]:
        """The stage's sites, those that are solved as one matrix together."""
        patterns = {self.patterns[site.name] for site in stage}
        small = sum(site.rows for site in stage) <= _STACK * stage[0].columns
        if small and len(patterns) == 1 and solvers.load(self.recipe.method).stackable:
            return [list(stage)]
        return [[site] for site in stage]

    def _solve_batch(self, block: Block, batch: Batch) -> dict[str, Tensor]:
        """Solve, write and record the sites of a batch; returns their masks."""
        sites = [site for stack, _ in batch for site in stack]
        more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
        self.progress.solving(f"{sites[0].name}{more}")
        masks = {}
        with self.clock("solve"):
            start = time.perf_counter()
            dense = [_weights(stack) for stack, _ in batch]
            rows = [len(w) for w in dense[0]]
            try:
                solutions = self._find([torch.cat(own) if len(own) > 1 else own[0] for own in dense], batch, rows)
            except InputError as error:
                names = ", ".join(site.name for site in sites)
                raise InputError(f"{names}: {error}; another calibration text may help") from None
            seconds = (time.perf_counter() - start) / (len(batch) * sum(rows))
            for (stack, seen), own, solution in zip(batch, dense, solutions, strict=True):
                for site, w, part in zip(stack, own, solution.split(rows), strict=True):
                    masks[site.name] = part.mask
                    self.records.append(self._write(block, site, w, part, seen, seconds * len(w)))
        for record in self.records[-len(sites) :]:
            self.progress.site(record)
        self.edited.update(site.parameter for site in sites)
        return masks

    def _write(self, block: Block, site: Site, dense: Tensor, found: Solution, seen: Observed, seconds: float) -> SiteRecord:
        """Put the weights that were found into the model, as it stores them, and record what that did."""
        pattern = self.patterns[site.name]
        site.write(found.weight)
        after = site.weight.float()
        if not bool(torch.isfinite(after).all()):
            raise InputError(f"{site.name}: the pruned weights overflow {site.storage}; try --method wanda")
        verify(after, pattern)
        left = int((after != 0).sum())
        self.nonzero = (self.nonzero[0] + int((dense != 0).sum()), self.nonzero[1] + left)
        place = locate(self.names.get(site.parameter, [Piece(site.parameter)]), site.part)
        return SiteRecord(
            name=site.name,
            tensor=place.disk,
            part=part_text(place.part),
            block=block.index,
            pattern=str(pattern),
            shape=(after.shape[0], after.shape[1]),
            transposed=site.transposed,
            sparsity=1 - left / after.numel(),
            error=seen.sample.relative_error(dense, after),
            tokens=seen.sample.tokens,
            seconds=seconds,
            notes={**found.notes, **({"pool_share": site.columns / seen.statistic.tokens} if site.pool else {})},
        )

    def _find(self, dense: Sequence[Tensor], batch: Batch, rows: Sequence[int]) -> list[Solution]:
        """The method's solutions for the recipe's target, refitted where the recipe says so."""
        pattern = self.patterns[batch[0][0][0].name]
        stacked = Stacked(pattern, tuple(rows)) if len(rows) > 1 else pattern
        statistics = [seen.statistic for _, seen in batch]
        aims = [seen.aim(w) for w, (_, seen) in zip(dense, batch, strict=True)]
        if len(batch) == 1:
            return [self._solve(aims[0], statistics[0], stacked)]
        return self._solve(torch.stack(aims), type(statistics[0]).batch(statistics), stacked).unbind()

    def _solve(self, aim: Tensor, statistic: Statistic, pattern: Pattern) -> Solution:
        solution = solvers.load(self.recipe.method).solve(aim, statistic, pattern)
        if not self.recipe.refit:
            return solution
        assert isinstance(statistic, Gram)
        fit = masked_least_squares(statistic.mean(), aim, solution.mask, solution.weight)
        return replace(solution, weight=fit.weight, notes={**solution.notes, "residual": fit.residual, "steps": fit.steps})

    def _reconstruct(self, block: Block, masks: Mapping[str, Tensor], dense: Activations) -> None:
        with self.clock("reconstruct"):
            result, changed = reconstruct(block, masks, self.feed, dense.hidden)
        self.edited.update(changed)
        self.reconstructions.append(result)
        self.progress.reconstructed(result)


def _lean(group: Sequence[Stage], observed: Sequence[Observed]) -> None:
    """Let the experts of each pool lean on all of them with the weight of one token an input: with fewer than that, an
    expert's own Gram has no full rank."""
    pools: dict[str, list[Statistic]] = {}
    for stage, seen in zip(group, observed, strict=True):
        if stage[0].pool:
            pools.setdefault(stage[0].pool, []).append(seen.statistic)
    columns = {stage[0].pool: stage[0].columns for stage in group}
    for pool, statistics in pools.items():
        lean_on_pool(statistics, columns[pool])


def _weights(sites: Sequence[Site]) -> list[Tensor]:
    """Float32 copies of the sites' weights.

    Raises:
        InputError: one is not finite.
    """
    dense = [site.weight.to(torch.float32, copy=True) for site in sites]
    for site, w in zip(sites, dense, strict=True):
        if not bool(torch.isfinite(w).all()):
            raise InputError(f"the weights of {site.name} hold NaN or infinity")
    return dense
