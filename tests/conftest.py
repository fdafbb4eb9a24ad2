"""Tiny real models of several families, in memory and on disk."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached for the network would be wrong
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores, and so do those that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, block by block

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmprune.base import hardware
from llmprune.models.resolve import BUNDLED

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

VOCABULARY = 96
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
    "gemma3_text": {"sliding_window": 4, "layer_types": MIXED},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model whose norms and biases are not at their trivial initial values."""
    torch.manual_seed(seed)
    settings = BASE | FAMILIES.get(family, {}) | changes
    config = AutoConfig.for_model(family, **{key: value for key, value in settings.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tokens(windows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def exact_refit(w: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Least squares on the kept columns, row by row; float64."""
    fitted = torch.zeros_like(w, dtype=torch.float64)
    for row, kept in enumerate(mask):
        target = (x.double() @ w[row].double())[:, None]
        fitted[row, kept] = torch.linalg.lstsq(x[:, kept].double(), target).solution[:, 0]
    return fitted


@pytest.fixture(scope="session", autouse=True)
def _slow_bfloat16() -> Iterator[None]:
    """No test's `auto` depends on the machine: float32 is as if measured to be faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "bfloat16_products", lambda: 0.5)
        yield


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def saved(tmp_path: Path):
    """Save a model, sharded so that most blocks share no file; returns its folder."""

    def save(model: PreTrainedModel, name: str = "source") -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size="20KB")
        return folder

    return save


@pytest.fixture
def folder(saved) -> Path:
    """A tiny Llama with the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    path = saved(tiny_model("llama", vocab_size=len(tokenizer)))
    tokenizer.save_pretrained(path)
    return path


_READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    model, info = AutoModelForCausalLM.from_pretrained(line.rstrip("\\n"), output_loading_info=True)
    ids, amiss = torch.tensor([[5, 6, 7, 8]]), {key: sorted(map(str, value)) for key, value in info.items() if value}
    text = model.eval().generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert text.shape == (1, 7) and "llmprune" not in sys.modules
    print(json.dumps({"amiss": amiss, "logits": model(ids).logits[0].tolist()}), flush=True)
"""


@pytest.fixture
def fresh_compiler() -> None:
    """torch.compile as if it had compiled nothing: it refuses to compile one function for too many models."""
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def python() -> Iterator[list[str]]:
    """What a command that runs Python begins with, where nothing depends on how libraries are imported: see `forks`."""
    with forks.server() as words:
        yield words


@pytest.fixture(scope="session")
def read_elsewhere() -> Iterator[Callable[[Path], dict]]:
    """Another process, with plain transformers: loads a folder and generates. Returns the tensors that are missing,
    unexpected or of other shapes, by what is amiss, and the logits for tokens 5, 6, 7, 8.
    """
    command = [sys.executable, "-c", _READER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def read(folder: Path) -> dict:
            print(folder, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield read
        process.stdin.close()
