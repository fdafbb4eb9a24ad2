"""Which sites to prune, and to which pattern."""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmprune.base.errors import InputError
from llmprune.base.words import count
from llmprune.job.scan import Allocation, Scan
from llmprune.models.discover import unreached
from llmprune.models.sites import Block
from llmprune.numerics.patterns import Pattern, Unstructured

EVERY = Unstructured(0.5)  # which every matrix can have
STAYS_DENSE = "dense in the allocation"


@dataclass(frozen=True, slots=True)
class Selection:
    """`patterns`: site name -> pattern. `skipped`: what is left alone -> why. `shapes`: of all sites, (rows, columns)."""

    patterns: dict[str, Pattern]
    skipped: dict[str, str]
    shapes: dict[str, tuple[int, int]]

    def describe(self, asked: str) -> str:
        """In words, such as `2:4 in 28 matrices, 0 left out`."""
        return f"{asked} in {count(len(self.patterns), 'matrix')}, {len(self.skipped)} left out"

    def spread(self, allocation: Allocation) -> Selection:
        """The same sites with patterns of their own, by name or glob; those that stay dense are left out."""
        found = Selection({}, dict(self.skipped), self.shapes)
        for name in self.patterns:
            own = next(own for glob, own in allocation.items() if fnmatch.fnmatchcase(name, glob))
            if own is None:
                found.skipped[name] = STAYS_DENSE
            else:
                found.patterns[name] = own
        return found


def fitting(scan: Scan, selection: Selection) -> Scan:
    """`scan` of the matrices that are to be pruned alone.

    Raises:
        InputError: it lacks some, or was made of a model whose matrices have other shapes.
    """
    kept, left = [], set(selection.patterns)
    for one in scan.matrices:
        own = [name for name in left if fnmatch.fnmatchcase(name, one.name)]
        if own and any(selection.shapes[name] != (one.rows, one.columns) for name in own):
            raise InputError(f"the scan is of another model: {one.name} is {one.rows} x {one.columns} in it; scan this one")
        if own:
            kept.append(replace(one, sites=len(own)))
        left.difference_update(own)
    if left:
        raise InputError(f"the scan lacks {count(len(left), 'matrix')}, such as {min(left)}: scan this model")
    return replace(scan, matrices=kept)


def select(blocks: Sequence[Block], asked: Pattern | Allocation, *, only: Sequence[str], skip: Sequence[str]) -> Selection:
    """The sites that are to be pruned, each with its pattern: `asked`, or what it has for the site's name.

    Raises:
        InputError: as `select_sites`; or `asked` has a name or glob that matches nothing.
    """
    if not isinstance(asked, Mapping):
        return select_sites(blocks, asked, only=only, skip=skip)
    sites = [site for block in blocks for site in block.sites]
    for glob in asked:
        if not fnmatch.filter([site.name for site in sites], glob):
            raise InputError(f"--allocation: {glob} matches no matrix; they are named like {sites[0].name}")
    named = [site.name for site in sites if _matches(site.name, list(asked))]
    whole = select_sites(blocks, EVERY, only=only, skip=skip)
    inside = Selection({name: EVERY for name in whole.patterns if name in named}, dict(whole.skipped), whole.shapes)
    inside.skipped.update((name, "not in --allocation") for name in whole.patterns if name not in named)
    found = inside.spread(asked)
    for site in sites:
        own = found.patterns.get(site.name)
        if own is not None and (misfit := own.misfit(site.rows, site.columns)):
            raise InputError(f"--allocation: {site.name} cannot be {own}: {misfit}")
    if not found.patterns:
        raise InputError("--allocation leaves nothing to prune: all that it names stays dense or is left out")
    return found


def select_sites(blocks: Sequence[Block], pattern: Pattern, *, only: Sequence[str], skip: Sequence[str]) -> Selection:
    """Give `pattern` to every site that matches a glob of `only` (where there is any) and none of `skip`.

    Raises:
        InputError: a glob matches nothing, nothing is left to prune, or a site's columns do not fit the pattern.
    """
    sites = [site for block in blocks for site in block.sites]
    if not sites:
        raise InputError(f"found no linear layers in {count(len(blocks), 'decoder block')}: looked for nn.Linear and Conv1D")
    for flag, globs in (("--only", only), ("--skip", skip)):
        for glob in globs:
            if not fnmatch.filter([site.name for site in sites], glob):
                raise InputError(f"{flag} {glob!r} matches no site; sites are named like {sites[0].name}")
    skipped = {name: why for block in blocks for name, why in unreached(block).items()}
    selection = Selection({}, skipped, {site.name: (site.rows, site.columns) for site in sites})
    misfits: dict[str, str] = {}
    for site in sites:
        if only and not _matches(site.name, only):
            selection.skipped[site.name] = "not in --only"
        elif _matches(site.name, skip):
            selection.skipped[site.name] = "in --skip"
        elif misfit := pattern.misfit(*site.weight.shape):
            misfits[site.name] = misfit
        else:
            selection.patterns[site.name] = pattern
    if misfits:
        raise _misfitting(misfits, selection, pattern)
    if not selection.patterns:
        raise InputError("--only and --skip leave nothing to prune")
    return selection


def _misfitting(misfits: dict[str, str], selection: Selection, pattern: Pattern) -> InputError:
    """Which sites cannot have the pattern, those of one last name together, and how to leave them out and no others."""
    fitting = {_last(name) for name in selection.patterns}
    kinds: dict[str, str] = {}
    for name, why in misfits.items():
        kinds.setdefault(name if _last(name) in fitting else f"*.{_last(name)}", why)
    by_reason: dict[str, list[str]] = {}
    for glob, why in kinds.items():
        by_reason.setdefault(why, []).append(glob.removeprefix("*."))
    reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
    what = f"{count(len(kinds), 'kind')} of matrices cannot be {pattern} ({reasons})"
    if not selection.patterns:
        return InputError(f"{what}, and there are no others: choose another sparsity")
    return InputError(f"{what}; leave them out with: {shlex.join(['--skip', *kinds])}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
