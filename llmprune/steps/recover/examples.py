"""What is trained on: windows, each with what the disk keeps of a teacher's predictions of it.

With its predictions kept the teacher need not be in memory while the model trains. Of each position that is its likeliest next
tokens and the probability of all others together: without the latter, the model would learn to be too sure (Anshumann et al.,
"Sparse logit sampling", 2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from llmprune.data.windows import Windows

TOKENS, LOGS = "teacher_tokens", "teacher_logs"
_WINDOWS = 16  # a file


@dataclass(frozen=True, slots=True)
class Predictions:
    """Kept predictions of windows; `first`: which of those that are kept comes first."""

    folder: Path
    first: int = 0

    def of(self, window: int) -> dict[str, Tensor]:
        file, row = divmod(self.first + window, _WINDOWS)
        with safe_open(_file(self.folder, file), framework="pt") as kept:  # reads this window's rows alone
            return {name: kept.get_slice(name)[row] for name in (TOKENS, LOGS)}


@dataclass(frozen=True)
class Examples(Dataset[dict[str, Tensor]]):
    windows: Windows
    predictions: Predictions | None = None

    def __len__(self) -> int:
        return len(self.windows.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        kept = self.predictions.of(index) if self.predictions else {}
        return {"input_ids": self.windows.ids[index], **kept}

    def batches(self, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """In order, `size` windows at a time."""
        for start in range(0, len(self), size):
            rows = [self[index] for index in range(start, min(start + size, len(self)))]
            yield {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}


def likeliest(logits: Tensor, top: int) -> dict[str, Tensor]:
    """Of `logits` (..., vocabulary) the `top` likeliest tokens, int32, and the logarithms of their probabilities and of all
    others', (..., top + 1), float16."""
    best, tokens = torch.log_softmax(logits.float(), dim=-1).topk(top)
    return {TOKENS: tokens.int(), LOGS: torch.cat([best, others(logits.float(), tokens)], dim=-1).half()}


def others(logits: Tensor, tokens: Tensor) -> Tensor:
    """The logarithm of the probability of all but `tokens`, (..., 1)."""
    without = logits.scatter(-1, tokens.long(), -torch.inf)
    return without.logsumexp(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)


def nbytes(windows: Windows, top: int) -> int:
    """What the predictions take on the disk."""
    return windows.ids.numel() * (top * torch.int32.itemsize + (top + 1) * torch.float16.itemsize)


@torch.no_grad()
def keep(teacher: nn.Module, windows: Windows, top: int, folder: Path, share: tuple[int, int]) -> Iterator[float]:
    """Keep what `teacher` predicts in `folder`, where it is not there yet; yields how much is done, from 0 to 1.

    Args:
        share: which of how many processes this one is, each of which keeps its part of the files.
    """
    folder.mkdir(exist_ok=True)
    device = next(teacher.parameters()).device
    parts = list(enumerate(windows.ids.split(_WINDOWS)))[share[0] :: share[1]]
    for done, (number, ids) in enumerate(parts, start=1):
        file = _file(folder, number)
        if not file.exists():
            rows = [likeliest(teacher(input_ids=own[None].to(device), use_cache=False).logits[0, :-1], top) for own in ids]
            draft = file.with_suffix(".draft")
            save_file({name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}, draft)
            draft.replace(file)
        yield done / len(parts)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"
