"""Text to token windows, for calibration and for evaluation.

A text is named (`pydoc`, `wikitext2`, `c4`, `ptb`), a Hub dataset id, or a local .txt, .jsonl, .json, .parquet file, plain
or .gz. Calibration windows are disjoint, drawn at random with a seed from documents in random order; the papers cut each
from one long document of `c4` instead.

Evaluation windows are disjoint and cut from one long text, a shorter rest left out. `wikitext2`, `ptb` and `c4` are read as
SparseGPT and Wanda read them: the test split of the first two, its rows joined by blank lines and by spaces; of `c4` the
first 1,100 documents of the first validation file, joined by spaces, and at most the first 256 windows. Any other text is
taken whole, its documents joined by blank lines.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.demo import text as pydoc
from llmprune.errors import InputError, MachineError, reason, unknown, user_path
from llmprune.words import count

Given: TypeAlias = Tensor | Mapping[str, Any] | Sequence[Any]  # calibration samples that the caller tokenised
Use = Literal["calibration", "evaluation"]
NAMED = ("pydoc", "wikitext2", "c4", "ptb")
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_SEPARATOR = "\n\n"
_ENOUGH = 4  # calibration windows are drawn from this many times the tokens needed, where there are as many


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """How documents become evaluation windows: so many of the first ones (None: all), what joins them, and how many windows."""

    documents: int | None = None
    joined: str = _SEPARATOR
    windows: int | None = None


@dataclass(frozen=True, slots=True)
class _HubText:
    """Where a text lies on the Hub; its splits are `train`, to calibrate, and `test`, to evaluate.

    Attributes:
        name: the configuration.
        files: by use, where not all files of the split are wanted or the dataset does not say which they are.
        joined: what the papers put between rows that are lines of one text; None: each row is a document.
        evaluated: how documents become the text to evaluate on.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    files: Mapping[Use, str] | None = None
    column: str = "text"
    joined: str | None = None
    evaluated: _Evaluated = _Evaluated()


_HUB = {
    "wikitext2": _HubText("Salesforce/wikitext", name="wikitext-2-raw-v1", joined=_SEPARATOR),
    "c4": _HubText(
        "allenai/c4",
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        evaluated=_Evaluated(documents=1100, joined=" ", windows=256),
    ),
    "ptb": _HubText(  # its own files are a script, which datasets no longer run: the Hub's conversion
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files={"calibration": "penn_treebank/train/*.parquet", "evaluation": "penn_treebank/test/*.parquet"},
        column="sentence",
        joined=" ",
    ),
}


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
        """Model inputs, `size` windows at a time, on `device`."""
        size = min(size, len(self.ids))
        masks = [None] * len(self.ids) if self.mask is None else self.mask.split(size)
        for ids, mask in zip(self.ids.split(size), masks, strict=False):
            yield {"input_ids": ids.to(device)} | ({} if mask is None else {"attention_mask": mask.to(device)})

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

    def tokens(self) -> int:
        """Real tokens."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())


def load_documents(text: str, use: Use) -> Sequence[str]:
    """The documents of a named text, Hub dataset or file; `use` picks the split.

    Raises:
        InputError: there is no such text, or it is empty or unreadable.
    """
    if text == "pydoc":
        return pydoc.documents(use)
    documents = _read_file(user_path(text, "text file")) if _is_file(text) else _read_hub(text, use)
    if not any(document and document.strip() for document in documents):
        raise InputError(f"text {text} is empty")
    return documents


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


def evaluation_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, seqlen: int) -> Windows:
    """The evaluation split of a text in disjoint windows of `seqlen` tokens, by the protocol of its name.

    Raises:
        InputError: the text is shorter than one window.
    """
    protocol = _HUB[text].evaluated if text in _HUB else _Evaluated()
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
    return Windows(torch.cat(ids), "given tokens", None if bool(mask.all()) else mask)


_GRID = "calibration samples must be integer token ids, (windows, length): pad to one length and pass attention_mask"


def _grid(tokens: Any) -> Tensor:
    """Tokens of one window or several as (windows, length)."""
    try:
        tensor = torch.atleast_2d(torch.as_tensor(tokens))
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
        ids += tokenizer(document + _SEPARATOR, verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.long)


def names_a_file(text: str) -> bool:
    """Whether a text goes by the name of a file; no name of ours and no dataset on the Hub looks like one."""
    return text.removesuffix(".gz").endswith((*_SUFFIXES, ".csv", ".md")) or text.startswith(("/", ".", "~"))


def _is_file(text: str) -> bool:
    if text in NAMED:
        return False  # whatever lies here under that name
    path = user_path(text, "text")
    if path.is_dir():
        raise InputError(f"text {text} is a folder: pass a file ({', '.join(_SUFFIXES)}, or .gz of one)")
    if path.exists() and not path.is_file():
        raise InputError(f"text {text} is no regular file")
    if not path.exists() and names_a_file(text):
        raise InputError(f"text file {text} does not exist")
    return path.is_file()


def _read_file(path: Path) -> list[str]:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _SUFFIXES:
        raise InputError(f"text file {path} has an unknown ending; use {', '.join(_SUFFIXES)}, or .gz of one")
    if suffix == ".parquet":
        return _texts(_parquet_rows(path), path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        content = raw.decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"text file {path} is not a whole gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise InputError(f"cannot read text file {path}: {error.strerror or error}") from None
    if not content.strip():
        raise InputError(f"text file {path} is empty")
    if suffix == ".txt":
        return [content]
    return _texts(_json_rows(content, path, lines=suffix == ".jsonl"), path)


def _json_rows(content: str, path: Path, *, lines: bool) -> list[Any]:
    rows: list[Any] = []
    pieces = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()] if lines else [(1, content)]
    for number, piece in pieces:
        try:
            rows.append(json.loads(piece))
        except (ValueError, RecursionError) as error:
            raise InputError(f"text file {path}, line {number}, is not JSON: {reason(error)}") from None
    return rows if lines or not isinstance(rows[0], list) else rows[0]


def _parquet_rows(path: Path) -> list[Any]:
    import pyarrow  # arrives with datasets; slow to import, seldom needed
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"text file {path} is not a whole Parquet file: {reason(error)}") from None


def _texts(rows: Sequence[Any], path: Path) -> list[str]:
    texts: list[str] = []
    for number, row in enumerate(rows, 1):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise InputError(f"text file {path}, record {number}, has no text: give strings, or objects with a `text` string")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"text file {path}, record {number}, holds half a surrogate pair, which is no character")
        texts.append(text)
    return texts


def _read_hub(text: str, use: Use) -> Sequence[str]:
    if text not in NAMED and "/" not in text:
        raise InputError(f"{unknown('text', text, NAMED)}; otherwise pass a file or a Hub dataset id such as owner/name")
    import datasets  # slow to import, seldom needed

    known, split = _HUB.get(text, _HubText(text)), "train" if use == "calibration" else "test"
    files = {split: known.files[use]} if known.files else None
    try:
        rows = datasets.load_dataset(known.path, known.name, split=split, data_files=files, revision=known.revision)
    except (HTTPError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        kind = MachineError if unreachable(error) else InputError
        raise kind(f"cannot load text {text} from the Hub ({reason(error)}); go online or pass a local file") from None
    if known.column not in rows.column_names:
        raise InputError(f"Hub dataset {text} has no `{known.column}` column, only {', '.join(rows.column_names)}")
    texts = rows[known.column]
    if known.joined is not None:
        return [known.joined.join(texts)]
    return texts


def unreachable(error: BaseException | None) -> bool:
    """Whether the network or the Hub is behind an error, not what was asked for, or that to stay offline was asked for."""
    while error is not None and not is_offline_mode():
        status = getattr(getattr(error, "response", None), "status_code", 500)
        if isinstance(error, (ConnectionError, LocalEntryNotFoundError)) or (isinstance(error, HTTPError) and status >= 500):
            return True
        error = error.__cause__ or error.__context__
    return False
