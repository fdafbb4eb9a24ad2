"""Text to token windows, for calibration and for evaluation.

A text is named (`pydoc`, `wikitext2`, `c4`), a Hub dataset id, or a local .txt, .jsonl, .json, .parquet file, plain
or .gz. Calibration windows are disjoint, drawn at random with a seed; evaluation windows follow the papers' protocol:
the whole split concatenated and cut into disjoint windows, a shorter rest left out.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.demo import text as pydoc
from llmprune.errors import InputError, unknown

Use = Literal["calibration", "evaluation"]
NAMED = ("pydoc", "wikitext2", "c4")
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_SEPARATOR = "\n\n"
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

    def batches(self, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """Model inputs, `size` windows at a time, on `device`."""
        masks = [None] * len(self.ids) if self.mask is None else self.mask.split(size)
        for ids, mask in zip(self.ids.split(size), masks, strict=False):
            yield {"input_ids": ids.to(device)} | ({} if mask is None else {"attention_mask": mask.to(device)})

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
    documents = _read_file(Path(text)) if _is_file(text) else _read_hub(text, use)
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
    count = len(ids) // seqlen
    if not count:
        raise _too_short(text, ids, seqlen)
    if count < samples:
        raise InputError(
            f"text {text} gives {count} windows of {seqlen} tokens, fewer than the {samples} asked for; "
            f"pass --samples {count} or a shorter --seqlen"
        )
    offset = rng.randrange(len(ids) - count * seqlen + 1)
    windows = ids[offset : offset + count * seqlen].view(count, seqlen)
    return Windows(windows[rng.sample(range(count), samples)], text)


def evaluation_windows(text: str, tokenizer: PreTrainedTokenizerBase, *, seqlen: int) -> Windows:
    """The whole evaluation split of a text in disjoint windows of `seqlen` tokens.

    Raises:
        InputError: the text is shorter than one window.
    """
    joined = _SEPARATOR.join(load_documents(text, "evaluation"))
    ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"], dtype=torch.long)
    count = len(ids) // seqlen
    if not count:
        raise _too_short(text, ids, seqlen)
    return Windows(ids[: count * seqlen].view(count, seqlen), text)


def given_windows(samples: Tensor | Sequence[Any]) -> Windows:
    """Windows that the caller tokenised: (windows, length) ids, or mappings of `input_ids` and `attention_mask`.

    Raises:
        InputError: they are empty, or of different lengths (pad them, with a mask).
    """
    if isinstance(samples, Tensor):
        samples = [{"input_ids": samples}]
    rows = [_rows(sample["input_ids"]) for sample in samples]
    if len({row.shape[1] for row in rows}) != 1:
        raise InputError("calibration samples must be given, all of one length: pad them and pass attention_mask")
    masks = [
        _rows(s["attention_mask"]) if "attention_mask" in s else torch.ones_like(r) for s, r in zip(samples, rows, strict=True)
    ]
    mask = torch.cat(masks)
    return Windows(torch.cat(rows), "given tokens", None if bool(mask.all()) else mask)


def _rows(tokens: Any) -> Tensor:
    """Tokens of one window or several as (windows, length)."""
    return torch.atleast_2d(torch.as_tensor(tokens, dtype=torch.long))


def _too_short(text: str, ids: Tensor, seqlen: int) -> InputError:
    return InputError(f"text {text} has {len(ids)} tokens, fewer than one window of {seqlen}; pass a shorter --seqlen")


def _tokenize(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, enough: int) -> Tensor:
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document + _SEPARATOR, verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.long)


def _is_file(text: str) -> bool:
    path = Path(text).expanduser()
    looks = text.removesuffix(".gz").endswith(_SUFFIXES) or text.startswith(("/", ".", "~"))
    if not path.exists() and looks:
        raise InputError(f"text file {text} does not exist")
    if path.is_dir():
        raise InputError(f"text {text} is a folder: pass a file ({', '.join(_SUFFIXES)}, or .gz of one)")
    return path.is_file()


def _read_file(path: Path) -> list[str]:
    path = path.expanduser()
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in _SUFFIXES:
        raise InputError(f"text file {path} has an unknown ending; use {', '.join(_SUFFIXES)}, or .gz of one")
    if suffix == ".parquet":
        return _texts(_parquet_rows(path), path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        content = raw.decode("utf-8")
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
    pieces = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()] if lines else [(1, content)]
    for number, piece in pieces:
        try:
            rows.append(json.loads(piece))
        except ValueError as error:
            raise InputError(f"text file {path}, line {number}, is not JSON: {error}") from None
    return rows if lines or not isinstance(rows[0], list) else rows[0]


def _parquet_rows(path: Path) -> list[Any]:
    import pyarrow  # arrives with datasets; slow to import, seldom needed
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"text file {path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None


def _texts(rows: Sequence[Any], path: Path) -> list[str]:
    texts: list[str] = []
    for number, row in enumerate(rows, 1):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise InputError(f"text file {path}, record {number}, has no text: give strings, or objects with a `text` string")
        texts.append(text)
    return texts


def _read_hub(text: str, use: Use) -> Sequence[str]:
    if text not in NAMED and "/" not in text:
        raise InputError(f"{unknown('text', text, NAMED)}; otherwise pass a file or a Hub dataset id such as owner/name")
    import datasets  # slow to import, seldom needed

    split = "train" if use == "calibration" else "test"
    arguments: dict[str, Any] = {"path": text, "split": split}
    if text == "wikitext2":
        arguments |= {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
    elif text == "c4":
        part = "en/c4-train.00000-of-01024.json.gz" if use == "calibration" else "en/c4-validation.00000-of-00008.json.gz"
        arguments |= {"path": "allenai/c4", "data_files": {split: part}}
    try:
        rows = datasets.load_dataset(**arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"cannot load text {text} from the Hub ({reason}); go online or pass a local file") from None
    if "text" not in rows.column_names:
        raise InputError(f"Hub dataset {text} has no `text` column, only {', '.join(rows.column_names)}")
    if text == "wikitext2":  # rows are lines of articles: only joined do they make text
        return [_SEPARATOR.join(rows["text"])]
    if text == "c4" and use == "evaluation":  # as the papers do
        return rows[:1100]["text"]
    return rows["text"]
