"""Text to token windows, for calibration and for evaluation.

Calibration windows are disjoint, drawn at random with a seed from documents in random order; the papers cut each from one long
document of `c4` instead.

Evaluation windows are disjoint and cut from one long text, a shorter rest left out. `wikitext2`, `ptb` and `c4` are read as
SparseGPT and Wanda read them: the test split of the first two, its rows joined by blank lines and by spaces; of `c4` the
first 1,100 documents of the first validation file, joined by spaces, and at most the first 256 windows. Any other text is
taken whole, its documents joined by blank lines.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.base.errors import InputError
from llmprune.base.words import count
from llmprune.data import pydoc
from llmprune.data.documents import GIVEN, SEPARATOR, evaluation_protocol, load_documents

Given: TypeAlias = Tensor | Mapping[str, Any] | Sequence[Any]  # calibration samples that the caller tokenised
IGNORED = -100  # the label of what is not predicted; cross_entropy's own default
_ENOUGH = 4  # calibration windows are drawn from this many times the tokens needed, where there are as many


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows of one length.

    Attributes:
        ids: (windows, length) int64.
        mask: (windows, length), 1 where a token is real; None where all are.
        text: what they were cut from, in words.
    """

    ids: Tensor
    text: str
    mask: Tensor | None = None

    def digest(self) -> str:
        """Of the tokens; equal for equal windows."""
        parts = [self.ids, *([] if self.mask is None else [self.mask])]
        return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()[:16]

    def batches(self, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Model inputs, `size` windows at a time, on `device`; with a mask where there is padding."""
        size = min(size, len(self.ids))
        masks = [None] * len(self.ids) if self.mask is None else self.mask.split(size)
        for ids, mask in zip(self.ids.split(size), masks, strict=False):
            padded = mask is not None and not bool(mask.all())
            yield {"input_ids": ids.to(device)} | ({"attention_mask": mask.to(device)} if mask is not None and padded else {})

    def share(self, rank: int, size: int) -> Windows:
        """Those that fall to process `rank` of `size`: every `size`-th, so that a batch of all processes holds what it did.

        Raises:
            InputError: there are fewer windows than processes.
        """
        if len(self.ids) < size:
            raise InputError(
                f"{count(size, 'process')} cannot share {count(len(self.ids), 'window')} of text {self.text}: "
                "start fewer, or ask for more --samples or a shorter --seqlen"
            )
        return Windows(self.ids[rank::size], self.text, None if self.mask is None else self.mask[rank::size])

    def first(self, tokens: int, least: int) -> Windows:
        """The first windows that have so many tokens, at least so many windows."""
        some = max(tokens // self.ids.shape[1], least, 1)
        return Windows(self.ids[:some], self.text, None if self.mask is None else self.mask[:some])

    def tokens(self) -> int:
        """Real tokens."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


def next_token_labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """The tokens of windows that those before them predict, (windows, length - 1), from the model's inputs (windows, length).

    Padding is not predicted and predicts nothing: its labels are `IGNORED`.
    """
    labels = inputs["input_ids"][:, 1:]
    if "attention_mask" not in inputs:
        return labels
    real = inputs["attention_mask"].bool()
    return labels.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)


def calibration_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, seqlen: int, seed: int) -> Windows:
    """`samples` disjoint windows of `seqlen` tokens, drawn at random.

    Raises:
        InputError: the text holds fewer; the message says how many.
    """
    documents = load_documents(text, "calibration")
    rng = random.Random(seed)
    order = rng.sample(range(len(documents)), len(documents))
    ids = _tokenize((documents[i] for i in order), tokenizer, enough=_ENOUGH * samples * seqlen)
    there = len(ids) // seqlen
    if not there:
        raise _too_short(text, ids, seqlen)
    if there < samples:
        raise InputError(
            f"text {text} gives {count(there, 'window')} of {seqlen} tokens, fewer than the {samples} asked for; "
            f"pass --samples {there} or a shorter --seqlen"
        )
    offset = rng.randrange(len(ids) - there * seqlen + 1)
    windows = ids[offset : offset + there * seqlen].view(there, seqlen)
    return Windows(windows[rng.sample(range(there), samples)], text)


def training_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seqlen: int, seed: int) -> Windows:
    """At most `tokens` tokens in disjoint windows, of documents in random order; of `pydoc` its part for training.

    Raises:
        InputError: the text holds fewer than two windows.
    """
    documents = pydoc.training() if text == "pydoc" else load_documents(text, "calibration")
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    ids = _tokenize((documents[i] for i in order), tokenizer, enough=tokens)[:tokens]
    if len(ids) < 2 * seqlen:
        raise InputError(
            f"text {text} has {count(len(ids), 'token')} to train on, fewer than two windows of {seqlen}, of which one is held "
            "out; pass a shorter --seqlen, more --tokens, or a longer text"
        )
    windows = len(ids) // seqlen
    return Windows(ids[: windows * seqlen].view(windows, seqlen), text)


def evaluation_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, seqlen: int) -> Windows:
    """The evaluation split of a text in disjoint windows of `seqlen` tokens, by the protocol of its name.

    Raises:
        InputError: the text is shorter than one window.
    """
    protocol = evaluation_protocol(text)
    joined = protocol.joined.join(load_documents(text, "evaluation")[: protocol.documents])
    ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"], dtype=torch.long)
    windows = min(len(ids) // seqlen, protocol.windows or len(ids))
    if not windows:
        raise _too_short(text, ids, seqlen)
    return Windows(ids[: windows * seqlen].view(windows, seqlen), text)


def given_windows(samples: Given) -> Windows:
    """Windows that the caller tokenised: ids (windows, length), or what a tokenizer returns, or a list of those.

    Raises:
        InputError: they are not integers in a grid, of different lengths, or all padding.
    """
    several = isinstance(samples, (list, tuple)) and samples and all(isinstance(part, Mapping) for part in samples)
    parts = list(samples) if several else [samples if isinstance(samples, Mapping) else {"input_ids": samples}]
    ids = [_grid(part.get("input_ids")) for part in parts]
    masks = [
        _grid(p["attention_mask"]) if "attention_mask" in p else torch.ones_like(i) for p, i in zip(parts, ids, strict=True)
    ]
    if len({row.shape[1] for row in ids}) != 1 or any(i.shape != m.shape for i, m in zip(ids, masks, strict=True)):
        raise InputError(_GRID)
    mask = torch.cat(masks)
    if not bool(mask.any()):
        raise InputError("the calibration samples hold no real token: every attention_mask is 0")
    return Windows(torch.cat(ids), GIVEN, None if bool(mask.all()) else mask)


_GRID = "calibration samples must be integer token ids, (windows, length): pad to one length and pass attention_mask"


def _grid(tokens: Any) -> Tensor:
    """Tokens of one window or several as (windows, length)."""
    try:
        tensor = torch.atleast_2d(torch.as_tensor(tokens, device="cpu"))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(_GRID) from None
    if tensor.ndim != 2 or not tensor.numel() or tensor.is_floating_point() or tensor.is_complex():
        raise InputError(_GRID)
    return tensor.long()


def _too_short(text: str, ids: Tensor, seqlen: int) -> InputError:
    return InputError(f"text {text} has {count(len(ids), 'token')}, fewer than one window of {seqlen}; pass a shorter --seqlen")


def _tokenize(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, enough: int) -> Tensor:
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document + SEPARATOR, verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.long)


@dataclass(frozen=True, slots=True)
class Texts:
    """`notes` say what was decided for the user, in plain lines."""

    calibration: Windows
    evaluation: Windows | None
    notes: tuple[str, ...]
