"""The visitor that quantises: collect what a stage's inputs say, round its matrices, write them back, record."""

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
from llmprune.base.precision import full_float32
from llmprune.base.processes import Ranks
from llmprune.formats.quantised import code_tensors
from llmprune.job.progress import Progress
from llmprune.job.record import CodeRecord, relative
from llmprune.models.names import Names, Piece, locate
from llmprune.models.sites import Block, Site, Stage, part_text
from llmprune.numerics.codes import values
from llmprune.numerics.stats import SAMPLE_TOKENS, CrossGram, Gram, InputSample
from llmprune.steps.quantise.grid import Quantised
from llmprune.steps.quantise.plan import Plan
from llmprune.steps.quantise.rounding.base import Rounding
from llmprune.steps.weights.observing import Observed, add_up, passes, traced
from llmprune.stream.activations import Activations, PairedDense


@dataclass(slots=True)
class Quantiser:
    """Quantises one block after the other.

    Attributes:
        feed: the calibration tokens as the quantised model sees them.
        source: the same as the model sees them that is quantised, where the rounding imitates that; advanced here.
        tokens: calibration tokens in `feed`.
        last: index of the model's last block.
        ranks: the processes that share the run; each feeds its own windows and rounds its share of each matrix's rows.
        names: where on disk the model's tensors are.
        edited: parameters that were changed, by full name in the model.
        coded: by tensor on disk, what stands there for it, of the block at hand.
        records: one a quantised matrix, in order.
        uncalled: sites that the model's forward never runs.
    """

    done: ClassVar[str] = "quantised"
    plan: Plan
    rounding: Rounding
    feed: Activations
    source: Activations | None
    tokens: int
    last: int
    progress: Progress
    clock: Clock
    ranks: Ranks
    names: Names
    edited: set[str]
    coded: dict[str, dict[str, Tensor]]
    records: list[CodeRecord] = field(default_factory=list)
    uncalled: list[str] = field(default_factory=list)

    def visit(self, block: Block) -> None:
        """Round the block's matrices, stage by stage.

        Raises:
            InputError: inputs or weights are not finite; the site is named.
        """
        self.coded.clear()
        reference = block.copy() if self.source is not None else None
        with self.clock("forward"):
            stages, uncalled = traced(self.feed, block, self.ranks)
        self.uncalled += uncalled
        planned = [[site for site in stage if site.name in self.plan.grids] for stage in stages]
        groups = passes([stage for stage in planned if stage])
        for group in groups:
            paired = None
            if self.source is not None and reference is not None:
                paired = PairedDense(self.source, reference, advance=block.index < self.last and group is groups[-1])
            with self.clock("forward"):
                observed = self.feed.collect(block, group, self._observe, paired)
            add_up(group, observed, self.ranks)
            for stage, seen in zip(group, observed, strict=True):
                for site in stage:
                    self.progress.solving(site.name)
                    self._quantise(block, site, seen)
        if not groups and self.source is not None and reference is not None and block.index < self.last:
            with self.clock("forward"):
                self.source.advance(reference)

    def report(self, block: Block) -> dict[str, Any]:
        """What came of a block, for `repeat`."""
        return {
            "codes": [asdict(record) for record in self.records if record.block == block.index],
            "uncalled": [site.name for site in block.sites if site.name in set(self.uncalled)],
        }

    def repeat(self, block: Block, report: Mapping[str, Any], restore: Callable[[Block], None]) -> None:
        """Instead of `visit`, for a block that an earlier run has done: `restore` gives it the weights of then."""
        self.coded.clear()
        reference = block.copy() if self.source is not None else None
        restore(block)
        if self.source is not None and reference is not None and block.index < self.last:
            with self.clock("forward"):
                self.source.advance(reference)
        self.records += [CodeRecord(**{**one, "shape": tuple(one["shape"])}) for one in report["codes"]]
        self.uncalled += report["uncalled"]
        self.progress.repeated(len(report["codes"]))

    def _observe(self, stage: Stage, device: torch.device) -> Observed:
        columns = stage[0].columns
        corrected = self.source is not None and not stage[0].pool  # the two streams choose different experts
        sample = InputSample(self.tokens // SAMPLE_TOKENS)
        return Observed(Gram(columns, device), sample, CrossGram(columns, device) if corrected else None, self.clock)

    def _quantise(self, block: Block, site: Site, seen: Observed) -> None:
        began, before = time.perf_counter(), site.weight.to(torch.float32, copy=True)
        if not bool(torch.isfinite(before).all()):
            raise InputError(f"the weights of {site.name} hold NaN or infinity")
        with self.clock("solve"):
            found = self._rounded(site, before, seen)
            synchronize(self.clock.device)
        seconds = time.perf_counter() - began
        scales = found.scales.to(site.storage)
        site.write(values(found.codes, scales))
        after = site.weight.float()
        if not bool(torch.isfinite(after).all()):
            raise InputError(f"{site.name}: scales overflow {site.storage}: quantise a bfloat16 copy of the model")
        place = locate(self.names.get(site.parameter, [Piece(site.parameter)]), site.part)
        self.edited.add(site.parameter)
        if site.name in self.plan.coded:
            self.coded[place.disk] = code_tensors(place.disk, found.codes.cpu(), scales.cpu(), found.grid.bits)
        lost, whole = self.ranks.totals(*seen.sample.errors(before, after))
        record = CodeRecord(
            name=site.name,
            tensor=place.disk,
            part=part_text(place.part),
            block=block.index,
            bits=found.grid.bits,
            group=found.grid.group,
            scale_bytes=site.storage.itemsize,
            shape=(site.rows, site.columns),
            transposed=site.transposed,
            coded=site.name in self.plan.coded,
            zeros=float((found.codes == 0).float().mean()),
            error=relative(lost, whole),
            seconds=seconds,
        )
        self.records.append(record)
        self.progress.quantised(record)

    @full_float32()
    def _rounded(self, site: Site, before: Tensor, seen: Observed) -> Quantised:
        """The matrix on its grid, of whose rows this process rounds its share."""
        assert isinstance(seen.statistic, Gram)
        grid, ranks = self.plan.grids[site.name], self.ranks
        zero = before == 0
        kept = ~zero if bool(zero.any()) else None
        cuts = [rank * len(before) // ranks.size for rank in range(ranks.size + 1)]
        parts = []
        for rank in range(ranks.size):
            own = slice(cuts[rank], cuts[rank + 1])
            codes = torch.empty_like(before[own])
            scales = before.new_empty(len(codes), site.columns // grid.group)
            if rank == ranks.rank and own.stop > own.start:
                target = seen.target(before[own]) if self.source is not None else before[own]
                part = self.rounding.quantise(target, None if kept is None else kept[own], seen.statistic, grid)
                codes, scales = part.codes, part.scales
            parts.append((ranks.of(rank, codes), ranks.of(rank, scales)))
        return Quantised(grid, *(torch.cat(each) for each in zip(*parts, strict=True)))
