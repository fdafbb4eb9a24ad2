"""What a run tells as it works: the protocol between a step and who shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.job.record import CodeRecord, Reconstruction, Removal, RunRecord, SiteRecord
from llmprune.job.scan import Scanned


@dataclass(frozen=True, slots=True)
class Progressed:
    """Of a training: `step` of `steps`; the loss on held-out windows, that of training since it was last told (None: not yet),
    and how fast it goes."""

    step: int
    steps: int
    held_out: float
    trained: float | None
    tokens_per_second: float
    seconds_left: float


class Progress:
    """What the pipeline tells as it works. This one shows nothing; subclasses show what they like."""

    def header(self, record: RunRecord, what: str, asked: str) -> None: ...

    def facts(self, facts: Mapping[str, str]) -> None: ...

    def note(self, text: str) -> None: ...

    def start(self, blocks: int, sites: int) -> None: ...

    def solving(self, site: str) -> None: ...

    def site(self, site: SiteRecord) -> None: ...

    def quantised(self, one: CodeRecord) -> None: ...

    def reconstructed(self, result: Reconstruction) -> None: ...

    def scanned(self, matrices: Sequence[Scanned], pattern: str) -> None: ...

    def searched(self, found: Mapping[str, Any], seconds_left: float) -> None: ...

    def removed(self, removal: Removal) -> None: ...

    def repeated(self, sites: int) -> None: ...

    def block(self, index: int) -> None: ...

    def trained(self, progressed: Progressed) -> None: ...

    def summary(self, record: RunRecord, output: Path | None) -> None: ...

    def recovered(self, record: RunRecord, output: Path) -> None: ...
