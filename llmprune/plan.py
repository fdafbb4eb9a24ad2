"""Which sites to prune, and to which pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.errors import InputError
from llmprune.models.discover import unreached
from llmprune.models.sites import Block
from llmprune.patterns import Pattern
from llmprune.words import count


@dataclass(frozen=True, slots=True)
class Plan:
    """`patterns`: site name -> pattern. `skipped`: what is left alone -> why."""

    patterns: dict[str, Pattern]
    skipped: dict[str, str]


def make_plan(blocks: Sequence[Block], pattern: Pattern, *, only: Sequence[str], skip: Sequence[str]) -> Plan:
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
    plan = Plan({}, {name: why for block in blocks for name, why in unreached(block).items()})
    for site in sites:
        if only and not _matches(site.name, only):
            plan.skipped[site.name] = "not in --only"
        elif _matches(site.name, skip):
            plan.skipped[site.name] = "in --skip"
        elif misfit := pattern.misfit(*site.weight.shape):
            raise InputError(
                f"{site.name} cannot be {pattern}: {misfit}; leave it out with --skip '*.{site.name.rsplit('.', 1)[-1]}'"
            )
        else:
            plan.patterns[site.name] = pattern
    if not plan.patterns:
        raise InputError("--only and --skip leave nothing to prune")
    return plan


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
