"""How far the model is from the dense one where its matrices are pruned so or so, from a library of solved matrices.

Candidates stream together, block by block. Those that are alike up to a block share all that comes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from llmprune.data.windows import Texts, Windows
from llmprune.job.job import Job
from llmprune.job.scan import Allocation
from llmprune.measure.divergence import streamed_divergences
from llmprune.models.experts import observable
from llmprune.models.sites import Block, Site
from llmprune.numerics.patterns import Pattern
from llmprune.steps.base import Work
from llmprune.steps.weights.library import Library, group_name
from llmprune.stream.activations import Activations

AT_ONCE = 2**16  # tokens whose hidden states are held, of all candidates that stream together


@dataclass(frozen=True, slots=True)
class _Text:
    """Windows to try candidates on: this process's share, the inputs of the first block, and the dense model's last outputs."""

    share: Windows
    inputs: Activations
    dense: Activations


@dataclass(slots=True)
class Trial:
    """Measures candidates, which leave the model as it is.

    Attributes:
        sites: names of those that candidates prune; all that `library` holds.
    """

    job: Job
    work: Work
    texts: Texts
    sites: frozenset[str]
    library: Library
    _texts: dict[int, _Text] = field(default_factory=dict)

    def measured(self, allocations: Sequence[Allocation], tokens: int) -> list[float]:
        """KL divergence from the dense model, nats a token, of the model pruned by each, on so many calibration tokens."""
        with self.job.clock("search"), observable(self.work.model, all_tokens=False):
            text = self._text(tokens)
            some = max(AT_ONCE // max(text.share.ids.numel() * self.job.ranks.size, 1), 1)
            parts = [allocations[i : i + some] for i in range(0, len(allocations), some)]
            return [nats for part in parts for nats in self._measure(part, text)]

    def _text(self, tokens: int) -> _Text:
        """The first windows that have so many tokens, or all there are."""
        ranks, work = self.job.ranks, self.work
        windows = self.texts.calibration.first(tokens, ranks.size)
        if (number := len(windows.ids)) not in self._texts:
            share = windows.share(ranks.rank, ranks.size)
            batch = self.job.batch(share.ids.shape[1], work.device)
            with work.outside():
                inputs = work.record(share, batch)
            dense = inputs.fork()
            for block in work.source.blocks():
                dense.advance(block)
            self._texts[number] = _Text(share, inputs, dense)
        return self._texts[number]

    def _measure(self, allocations: Sequence[Allocation], text: _Text) -> list[float]:
        going, owner = [text.inputs], [0] * len(allocations)
        for block in self.work.source.blocks():
            with self._changing(block) as put:
                made: dict[tuple[int, tuple[Pattern | None, ...]], Activations] = {}
                names = list(_by_name(block, self.sites))
                wanted = [(own, tuple(each[name] for name in names)) for own, each in zip(owner, allocations, strict=True)]
                for key in sorted(set(wanted), key=wanted.index):
                    put(dict(zip(names, key[1], strict=True)))
                    made[key] = going[key[0]].fork()
                    made[key].advance(block)
            going, owner = list(made.values()), [list(made).index(key) for key in wanted]
        work = self.work
        with work.outside():
            nats = streamed_divergences(
                work.model, list(work.blocks.values()), text.dense, going, text.share, work.device, self.job.ranks
            )
        return [nats[own] for own in owner]

    @contextmanager
    def _changing(self, block: Block) -> Iterator[Callable[[Allocation], None]]:
        """A function that prunes the block by an allocation, whatever another one has left it as; in the end it is dense."""
        by_name = _by_name(block, self.sites)
        dense = {name: [site.weight.clone() for site in sites] for name, sites in by_name.items()}
        now: dict[str, Pattern | None] = dict.fromkeys(by_name)

        def put(wanted: Allocation) -> None:
            for name in [name for name, pattern in wanted.items() if pattern != now[name]]:
                sites, pattern = by_name[name], wanted[name]
                weights = dense[name] if pattern is None else self.library.get(name, pattern, sites)
                for site, weight in zip(sites, weights, strict=True):
                    site.weight.copy_(weight)
                now[name] = pattern

        try:
            yield put
        finally:
            put(dict.fromkeys(by_name))


def _by_name(block: Block, sites: frozenset[str]) -> dict[str, list[Site]]:
    """The block's sites that are pruned, by the name that they share."""
    found: dict[str, list[Site]] = {}
    for site in block.sites:
        if site.name in sites:
            found.setdefault(group_name(site), []).append(site)
    return found
