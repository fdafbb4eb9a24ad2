"""Text to windows: reproducible, disjoint, honest about what is there."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hub import Hub, Repository, running
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmprune.base.errors import InputError
from llmprune.data import pydoc
from llmprune.data.documents import load_documents
from llmprune.data.windows import IGNORED, calibration_windows, evaluation_windows, given_windows, next_token_labels
from llmprune.models.resolve import BUNDLED


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BUNDLED["llama"])


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A text in which no two windows are alike."""
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(str(n) for n in range(3000)))
    return path


def calibration(text: str | Path, tokenizer: PreTrainedTokenizerBase, **changes: int):
    return calibration_windows(str(text), tokenizer, **({"samples": 8, "seqlen": 32, "seed": 0} | changes))


def test_windows_are_reproducible_and_depend_on_the_seed(numbers: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (calibration(numbers, tokenizer, seed=seed).ids for seed in (0, 0, 1))
    assert first.shape == (8, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_are_the_next_tokens_and_padding_has_none() -> None:
    """Padding on the left, on the right and in the middle, by hand."""
    ids = torch.tensor([[5, 6, 7, 8], [0, 6, 7, 8], [5, 6, 0, 0], [5, 0, 7, 8]])
    expected = [[6, 7, 8], [IGNORED, 7, 8], [6, IGNORED, IGNORED], [IGNORED, IGNORED, 8]]
    (padded,) = given_windows({"input_ids": ids, "attention_mask": ids != 0}).batches(4, torch.device("cpu"))
    assert next_token_labels(padded).tolist() == expected
    (whole,) = given_windows(ids[:1]).batches(1, torch.device("cpu"))
    assert "attention_mask" not in whole
    assert next_token_labels(whole).tolist() == expected[:1]


def test_a_batch_has_a_mask_where_it_has_padding() -> None:
    """What a model makes of a mask is kept for every batch: (windows, 1, length, length)."""
    mask = torch.ones(6, 4, dtype=torch.long)
    mask[3, :2] = 0
    given = given_windows({"input_ids": torch.ones(6, 4, dtype=torch.long), "attention_mask": mask})
    first, second, third = given.batches(2, torch.device("cpu"))
    assert [set(batch) for batch in (first, third)] == 2 * [{"input_ids"}]
    assert torch.equal(second["attention_mask"], mask[2:4])


def test_given_tokens_come_to_the_cpu() -> None:
    """Wherever they are, such as on a GPU; here by where torch makes new tensors."""
    with torch.device("meta"):
        windows = given_windows([[1, 2, 3]])
    assert windows.ids.tolist() == [[1, 2, 3]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_given_tokens_may_be_on_a_gpu() -> None:
    ids, mask = torch.ones(2, 4, dtype=torch.long).cuda(), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).cuda()
    windows = given_windows({"input_ids": ids, "attention_mask": mask})
    assert (windows.tokens(), windows.ids.device.type) == (7, "cpu")
    assert windows.digest()


def test_windows_are_disjoint_pieces_of_the_text(numbers: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = tokenizer(numbers.read_text() + "\n\n")["input_ids"]
    starts = []
    for window in calibration(numbers, tokenizer, samples=40).ids.tolist():
        starts += [i for i in range(len(stream) - 31) if stream[i : i + 32] == window]
    assert len(starts) == 40
    assert min(b - a for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False)) >= 32
    assert starts != sorted(starts)


def test_fewer_windows_than_asked_says_how_many(numbers: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    available = len(tokenizer(numbers.read_text() + "\n\n")["input_ids"]) // 32
    with pytest.raises(InputError, match=f"gives {available} windows of 32 tokens, fewer than the {available + 1} asked"):
        calibration(numbers, tokenizer, samples=available + 1)
    assert len(calibration(numbers, tokenizer, samples=available).ids) == available
    with pytest.raises(InputError, match="fewer than one window of 90000"):
        calibration(numbers, tokenizer, seqlen=90000)


def test_evaluation_follows_the_papers(numbers: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    stream = tokenizer(numbers.read_text())["input_ids"]
    windows = evaluation_windows(str(numbers), tokenizer, seqlen=100)
    assert windows.ids.flatten().tolist() == stream[: len(stream) // 100 * 100]


RECORDS = ["first document", "second one", "third"]


def write(path: Path, content: str) -> Path:
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_formats_hold_the_same_documents(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": record, "id": n} for n, record in enumerate(RECORDS)]
    lines = "\n".join(json.dumps(row) for row in rows)
    assert load_documents(str(write(tmp_path / f"a.jsonl{suffix}", lines)), "calibration") == RECORDS
    assert load_documents(str(write(tmp_path / f"a.json{suffix}", json.dumps(rows))), "calibration") == RECORDS
    assert load_documents(str(write(tmp_path / f"b.json{suffix}", json.dumps(RECORDS))), "calibration") == RECORDS
    assert load_documents(str(write(tmp_path / f"a.txt{suffix}", "\n".join(RECORDS))), "calibration") == ["\n".join(RECORDS)]


def test_marks_that_are_no_line_ends(tmp_path: Path) -> None:
    """A byte-order mark is no text, and JSON strings may hold U+2028 and U+0085 as they are."""
    record = "one\u2028two\u0085three"
    path = write(tmp_path / "a.jsonl", "\ufeff" + json.dumps({"text": record}, ensure_ascii=False) + "\r\n")
    assert load_documents(str(path), "calibration") == [record]
    assert load_documents(str(write(tmp_path / "a.txt", "\ufeffabc")), "calibration") == ["abc"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": RECORDS}), tmp_path / "a.parquet")
    assert load_documents(str(tmp_path / "a.parquet"), "calibration") == RECORDS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"not UTF-8 \(byte 3\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2, is not JSON"),
        ("null.jsonl", b'{"text": "a"}\n{"text": null}', "record 2, has no text"),
        ("number.json", b"[1, 2]", "record 1, has no text"),
        ("other.jsonl", b'{"body": "a"}', "record 1, has no text"),
        ("nothing.json", b"[]", "is empty"),
        ("blank.jsonl", b'{"text": " "}', "is empty"),
        ("short.txt.gz", gzip.compress(b"x" * 500, mtime=0)[:-9], "not a whole gzip"),
        ("fake.txt.gz", b"plain", "not a whole gzip"),
        ("fake.parquet", b"plain", "not a whole Parquet"),
        ("what.csv", b"a,b", "unknown ending"),
        ("half.jsonl", b'{"text": "\\ud800"}', "record 1, holds half a surrogate pair"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_documents(str(path), "calibration")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wikitxt2", "did you mean wikitext2"),
        ("owner/name", "go online or pass a local file"),
        ("c4", "go online"),
        (".", "is a folder"),
        ("/dev/null", "is no regular file"),
        ("no/such.csv", "does not exist"),
        ("x" * 5000, "is no usable path"),
        ("~nobody-of-this-name/x", "is no usable path"),
    ],
)
def test_texts_that_are_no_file(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_documents(text, "evaluation")
    assert "\n" not in str(caught.value)


def test_pydoc_splits_share_no_document() -> None:
    """Exact repeats across documents are few; the splits are drawn by name, so none is a document of two."""
    calibration_documents, evaluation_documents = pydoc.documents("calibration"), pydoc.documents("evaluation")
    assert not set(calibration_documents) & set(evaluation_documents)
    assert sum(map(len, calibration_documents)) > 200_000
    assert sum(map(len, evaluation_documents)) > 100_000
    pydoc._documents.cache_clear()  # as another process begins
    assert pydoc.documents("evaluation") == evaluation_documents


def test_pydoc_split_is_fixed_by_the_name() -> None:
    """These names' splits are what the bundled model was trained with: a change would leak held-out text."""
    known = {"json.decoder": "train", "topic:with": "train", "asyncio.events": "calibration", "builtin:builtins": "evaluation"}
    assert {name: pydoc.split_of(name) for name in known} == known


def parquet(column: str, rows: list[str]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), stream)
    return stream.getvalue()


def lines(*texts: str) -> bytes:
    return gzip.compress("\n".join(json.dumps({"text": text}) for text in texts).encode())


def hub_of_texts() -> Hub:
    """Datasets laid out as they are on the Hub."""
    hub, parts = Hub(), ("train", "test")
    name = "wikitext-2-raw-v1"
    splits = "".join(f"  - split: {part}\n    path: {name}/{part}-*\n" for part in parts)
    card = f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{splits}---\n".encode()
    files = {f"{name}/{part}-00000-of-00001.parquet": parquet("text", [f"{part} = one =", "two"]) for part in parts}
    hub.repositories["datasets/Salesforce/wikitext"] = wikitext = Repository()
    wikitext.commit({"README.md": card} | files)
    hub.repositories["datasets/allenai/c4"] = c4 = Repository()
    evaluation = lines(*(f"test {number}" for number in range(1200)))
    c4.commit(
        {"en/c4-train.00000-of-01024.json.gz": lines("one", "two"), "en/c4-validation.00000-of-00008.json.gz": evaluation}
    )
    hub.repositories["datasets/ptb-text-only/ptb_text_only"] = ptb = Repository()
    ptb.commit({"ptb_text_only.py": b"raise SystemExit('a script must not run')"})
    converted = {f"penn_treebank/{part}/0000.parquet": parquet("sentence", [f"{part} one", "two"]) for part in parts}
    ptb.commit(converted, "refs/convert/parquet")
    hub.repositories["datasets/acme/own"] = own = Repository()
    own.commit({f"{part}.jsonl": b'{"text": "own"}\n' for part in parts})
    hub.repositories["datasets/acme/other"] = other = Repository()
    other.commit({f"{part}.jsonl": b'{"words": "other"}\n' for part in parts})
    return hub


def test_pydoc_needs_no_datasets() -> None:
    """The library is imported where a text of the Hub is read, and may be missing else."""
    code = """
import sys
sys.modules["datasets"] = None  # importing it is an error
import llmprune
options = {"samples": 2, "seqlen": 16, "eval_text": "none", "method": "wanda"}
print(len(llmprune.prune("llama", sparsity="2:4", calibration="pydoc", **options).record.sites))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["28"], done.stderr


def test_what_lies_here_under_the_name_of_a_text_is_not_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    (tmp_path / "ptb").write_text("mine")
    for name in ("c4", "ptb"):
        with pytest.raises(InputError, match=f"cannot load text {name} from the Hub"):
            load_documents(name, "evaluation")


def test_texts_of_the_hub(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Through the real client, in a process that may use the network."""
    code = """
import json, sys
from transformers import AutoTokenizer
from llmprune.data.windows import evaluation_windows, load_documents
from llmprune.base.errors import InputError
for text in sys.argv[2:]:
    for use in ("calibration", "evaluation"):
        try:
            print(json.dumps([text, use, list(load_documents(text, use))]))
        except InputError as error:
            print(json.dumps([text, use, [type(error).__name__, str(error)]]))
if "c4" in sys.argv:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    for text, seqlen in (("c4", 4), ("c4", 64), ("wikitext2", 3)):
        windows = evaluation_windows(text, tokenizer, seqlen=seqlen)
        print(json.dumps([text, f"windows of {seqlen}", windows.ids.flatten().tolist()]))
"""
    hub, names = hub_of_texts(), ("ptb", "wikitext2", "c4", "acme/own", "acme/other", "acme/none")
    with running(hub):
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
        own |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        run = [sys.executable, "-c", code, str(BUNDLED["llama"]), *names]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | own)
    gone = [sys.executable, "-c", "import time; time.sleep = lambda seconds: None\n" + code, "", "acme/new"]  # it tries again
    failed = subprocess.run(gone, capture_output=True, text=True, check=True, env=os.environ | own)
    found = {(text, use): documents for text, use, documents in map(json.loads, done.stdout.splitlines())}
    assert found["ptb", "calibration"] == ["train one two"]
    assert found["ptb", "evaluation"] == ["test one two"]
    assert found["wikitext2", "calibration"] == ["train = one =\n\ntwo"]
    assert found["wikitext2", "evaluation"] == ["test = one =\n\ntwo"]
    assert found["c4", "calibration"] == ["one", "two"]
    assert found["c4", "evaluation"] == [f"test {number}" for number in range(1200)]
    whole = tokenizer(" ".join(f"test {number}" for number in range(1100)))["input_ids"]  # as the papers read it
    assert found["c4", "windows of 4"] == whole[: 256 * 4]
    assert found["c4", "windows of 64"] == whole[: len(whole) // 64 * 64]
    whole = tokenizer("test = one =\n\ntwo")["input_ids"]
    assert found["wikitext2", "windows of 3"] == whole[: len(whole) // 3 * 3]
    assert found["acme/own", "evaluation"] == ["own"]
    assert found["acme/other", "evaluation"] == ["InputError", "Hub dataset acme/other has no `text` column, only words"]
    assert found["acme/none", "calibration"][0] == "InputError"
    assert "acme/none" in found["acme/none", "calibration"][1]
    for line in failed.stdout.splitlines():
        kind, said = json.loads(line)[2]
        assert kind == "MachineError", said
        assert "go online or pass a local file" in said
