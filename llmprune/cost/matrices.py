"""The matrices that a token meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.models.sites import Site


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix (rows, columns) and, where it is an expert's, how many experts there are and its share of the tokens."""

    rows: int
    columns: int
    experts: int = 1
    share: float = 1.0


def matrices(sites: Sequence[Site], chosen: int | None) -> list[Matrix]:
    """Those of `sites`, in their order.

    Args:
        chosen: experts that a token is sent to; None: all.
    """
    experts: dict[str, set[object]] = {}
    for site in sites:
        if site.pool:
            experts.setdefault(site.pool, set()).add(site.part[0])
    found = []
    for site in sites:
        count = len(experts[site.pool]) if site.pool else 1
        found.append(Matrix(site.rows, site.columns, count, min((chosen or count) / count, 1)))
    return found
