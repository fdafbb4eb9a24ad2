"""The visitor that prunes weights: collect what a stage's inputs say, solve its matrices, write them back, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.base.clock import Clock
from llmprune.base.errors import InputError
from llmprune.base.hardware import synchronize
from llmprune.base.processes import Ranks
from llmprune.job.progress import Progress
from llmprune.job.recipes import Recipe
from llmprune.job.record import Reconstruction, SiteRecord, relative
from llmprune.models.names import Names, Piece, locate
from llmprune.models.sites import Block, Site, Stage, part_text
from llmprune.numerics.patterns import Pattern, verify
from llmprune.numerics.stats import SAMPLE_TOKENS, CrossGram, Gram, InputSample, Statistic
from llmprune.solvers import METHODS
from llmprune.solvers.base import Solution
from llmprune.steps.fitting import fit_block
from llmprune.steps.weights.batching import make_batches
from llmprune.steps.weights.observing import Observed, add_up, passes, traced
from llmprune.steps.weights.sharing import Round, make_rounds, solve
from llmprune.stream.activations import Activations, PairedDense


@dataclass(slots=True)
class WeightPruner:
    """Prunes one block after the other.

    Attributes:
        patterns: site name -> pattern; other sites are left alone.
        feed: the calibration tokens as the pruned model sees them.
        dense: the same as the dense model sees them, where the recipe asks for it; advanced here.
        tokens: calibration tokens in `feed`.
        last: index of the model's last block: what it puts out is only needed where the recipe fits it.
        ranks: the processes that share the run; each feeds its own windows.
        names: where on disk the model's tensors are; those that are not in it are called there as here.
        edited: parameters that were changed, by full name in the model.
        records: one a pruned matrix, in the order solved.
        reconstructions: one a block that was fitted.
        uncalled: sites that the model's forward never runs.
        nonzero: weights that are not zero in the matrices pruned so far, before and after.
    """

    done: ClassVar[str] = "pruned"
    patterns: Mapping[str, Pattern]
    recipe: Recipe
    feed: Activations
    dense: Activations | None
    tokens: int
    last: int
    progress: Progress
    clock: Clock
    ranks: Ranks
    names: Names
    edited: set[str]
    records: list[SiteRecord] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)
    nonzero: tuple[int, int] = (0, 0)

    def visit(self, block: Block) -> None:
        """Solve the block's planned sites, stage by stage or all from one pass; then fit the block, if asked to.

        Raises:
            InputError: inputs or weights are not finite, or the solver cannot work with them; the site is named.
        """
        reference = block.copy() if self.dense is not None else None
        groups = self._groups(block)
        onward = self.recipe.reconstruct or block.index < self.last  # whether the dense block's outputs are of use
        paired: PairedDense | None = None
        masks: dict[str, Tensor] = {}
        for group in groups:
            if self.dense is not None and reference is not None and self.recipe.target == "corrected":
                paired = PairedDense(self.dense, reference, advance=onward and group is groups[-1])
            with self.clock("forward"):
                observed = self.feed.collect(block, group, self._observe, paired)
            add_up(group, observed, self.ranks)
            batches = make_batches(group, observed, self.patterns, self.recipe.method)
            for work in make_rounds(batches, self.recipe.method, self.ranks.size):
                masks |= self._solve(block, work)
        if self.dense is None or reference is None:
            return
        if onward and paired is None:
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
        """Instead of `visit`, for a block that an earlier run has pruned: `restore` gives it the weights of then."""
        reference = block.copy() if self.dense is not None else None
        restore(block)
        if self.dense is not None and reference is not None and (self.recipe.reconstruct or block.index < self.last):
            with self.clock("forward"):
                self.dense.advance(reference)
        self.records += [SiteRecord(**{**site, "shape": tuple(site["shape"])}) for site in report["sites"]]
        self.reconstructions += [Reconstruction(**one) for one in report["reconstructions"]]
        self.uncalled += report["uncalled"]
        self.nonzero = tuple(report["nonzero"])
        self.progress.repeated(len(report["sites"]))

    def _groups(self, block: Block) -> list[list[Stage]]:
        """The planned sites by stage; stages in one group are solved from one pass."""
        with self.clock("forward"):
            found, uncalled = traced(self.feed, block, self.ranks)
        self.uncalled += uncalled
        planned = ([site for site in stage if site.name in self.patterns] for stage in found)
        stages: list[Stage] = [stage for stage in planned if stage]
        if not self.recipe.true_sequential:
            return [stages] if stages else []
        return passes(stages)

    def _observe(self, stage: Stage, device: torch.device) -> Observed:
        columns = stage[0].columns
        corrected = self.recipe.target == "corrected" and not stage[0].pool  # the two streams choose different experts
        kind: type[Statistic] = METHODS.get(self.recipe.method).statistic
        if self.recipe.target == "corrected" or self.recipe.refit:
            kind = Gram
        sample = InputSample(self.tokens // SAMPLE_TOKENS)
        return Observed(kind(columns, device), sample, CrossGram(columns, device) if corrected else None, self.clock)

    def _solve(self, block: Block, work: Round) -> dict[str, Tensor]:
        """Solve, write and record the sites of a round; returns their masks."""
        batches = list(dict.fromkeys(share.batch for share in work))
        sites = [site for batch in batches for site in batch.sites()]
        self.progress.solving(sites[0].name + (f" and {len(sites) - 1} more" if len(sites) > 1 else ""))
        masks: dict[str, Tensor] = {}
        with self.clock("solve"):
            start = time.perf_counter()
            dense = {batch: batch.dense() for batch in batches}
            found = solve(work, dense, self.recipe, self.ranks)
            synchronize(self.clock.device)
            seconds = (time.perf_counter() - start) / sum(site.rows for site in sites)
            records = []
            for batch, solution in found.items():
                for site, seen, w, own in batch.by_site(dense[batch], solution):
                    masks[site.name] = own.mask
                    records.append(self._write(block, site, w, own, seen, seconds * len(w)))
        self.records += records
        self.edited.update(site.parameter for site in sites)
        for record in records:
            self.progress.site(record)
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
        lost, whole = self.ranks.totals(*seen.sample.errors(dense, after))
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
            error=relative(lost, whole),
            tokens=seen.sample.tokens,
            seconds=seconds,
            notes={**found.notes, **({"pool_share": site.columns / seen.statistic.tokens} if site.pool else {})},
        )

    def _reconstruct(self, block: Block, masks: Mapping[str, Tensor], dense: Activations) -> None:
        self.feed.forget()  # the fit changes all of the block
        with self.clock("reconstruct"):
            result, changed = fit_block(block, masks, self.feed, dense.hidden, self.ranks, self.recipe.passes)
        self.edited.update(changed)
        self.reconstructions.append(result)
        self.progress.reconstructed(result)
