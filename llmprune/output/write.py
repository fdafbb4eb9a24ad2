"""The last files of an output folder: the model card, and the record with the sums of all others."""

from __future__ import annotations

from pathlib import Path

from llmprune.base.files import RECORD, sums, write_json
from llmprune.formats.kernels import bitmask
from llmprune.formats.matrices import packed_bytes
from llmprune.job.record import RunRecord, SiteRecord
from llmprune.models.checkpoint import Checkpoint
from llmprune.output.card import model_card
from llmprune.output.resume import MANIFEST


def write_record(folder: Path, record: RunRecord, name: str) -> None:
    """Add the model card, and last the record with the sums of all other files. The card names the repository, if any."""
    (folder / "README.md").write_text(model_card(record, record.arguments["push_to_hub"] or name), encoding="utf-8")
    checkpoint = Checkpoint(folder)
    record.size["bytes_after"] = checkpoint.nbytes()
    if not record.codes and (saved := _packing(record, checkpoint)):
        record.size["bytes_packed"] = checkpoint.nbytes() - saved
    record.files = sums(folder, MANIFEST, RECORD)
    write_json(folder / RECORD, record.as_dict())


def _packing(record: RunRecord, checkpoint: Checkpoint) -> int:
    """Bytes that packing will save: of pruned matrices that are whole tensors, stored as (out, in)."""
    able = [site for site in record.sites if not site.part and not site.transposed]
    return sum(_saved(site, checkpoint.tensors[site.tensor].nbytes) for site in able)


def _saved(site: SiteRecord, nbytes: int) -> int:
    weights = site.shape[0] * site.shape[1]
    if site.pattern == "2:4" and site.shape[1] % 4 == 0:
        return nbytes - packed_bytes(*site.shape, nbytes // weights)
    left = round((1 - site.sparsity) * weights)
    return max(nbytes - bitmask.nbytes(*site.shape, left, nbytes // weights), 0)
