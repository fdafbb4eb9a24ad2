"""Where texts come from.

A text is named (`pydoc`, `wikitext2`, `c4`, `ptb`), a Hub dataset id, or a local .txt, .jsonl, .json, .parquet file, plain
or .gz.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from llmprune.base.errors import InputError, MachineError, reason, unknown, user_path
from llmprune.data import pydoc

Use = Literal["calibration", "evaluation"]
GIVEN = "given tokens"  # what a text is called that the caller has tokenised
NAMED = ("pydoc", "wikitext2", "c4", "ptb")
_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class EvaluationProtocol:
    """How documents become evaluation windows: so many of the first ones (None: all), what joins them, and how many windows."""

    documents: int | None = None
    joined: str = SEPARATOR
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
    evaluated: EvaluationProtocol = EvaluationProtocol()


_HUB = {
    "wikitext2": _HubText("Salesforce/wikitext", name="wikitext-2-raw-v1", joined=SEPARATOR),
    "c4": _HubText(
        "allenai/c4",
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        evaluated=EvaluationProtocol(documents=1100, joined=" ", windows=256),
    ),
    "ptb": _HubText(  # its own files are a script, which datasets no longer run: the Hub's conversion
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        files={"calibration": "penn_treebank/train/*.parquet", "evaluation": "penn_treebank/test/*.parquet"},
        column="sentence",
        joined=" ",
    ),
}


def evaluation_protocol(text: str) -> EvaluationProtocol:
    """How a text is evaluated on, by its name."""
    return _HUB[text].evaluated if text in _HUB else EvaluationProtocol()


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
