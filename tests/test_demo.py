"""The bundled model is small, says how it was made, and behaves like a large one under pruning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llmprune
from llmprune.data import load_documents
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.resolve import BUNDLED
from llmprune.models.skeleton import load_config

FOLDER = BUNDLED["llama"]


def test_is_what_it_says() -> None:
    config = load_config(FOLDER)
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    checkpoint = Checkpoint(FOLDER)
    parameters = sum(info.shape[0] * (info.shape[1:] or (1,))[0] for info in checkpoint.tensors.values())
    made = json.loads((FOLDER / "training.json").read_text())
    assert made["parameters"] == parameters
    assert 3_500_000 < parameters < 4_500_000
    assert {str(info.dtype) for info in checkpoint.tensors.values()} == {"torch.bfloat16"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10 * 2**20
    assert made["log"][-1]["evaluation_loss"] < made["log"][0]["evaluation_loss"] - 1


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third of the evaluation split: enough to tell the methods apart, in a third of the time."""
    path = tmp_path_factory.mktemp("text") / "evaluation.txt"
    path.write_text("\n\n".join(list(load_documents("pydoc", "evaluation"))[::3]))
    return path


@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_methods_rank_as_on_large_models(sparsity: str, held_out: Path) -> None:
    """Dense, then SparseGPT, Wanda, magnitude, with clear gaps, on text that neither training nor calibration saw."""
    loss = {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        record = llmprune.prune("llama", sparsity=sparsity, method=method, samples=48, eval_text=str(held_out)).record
        assert record.dense
        assert record.pruned
        loss[method] = record.pruned.value / record.dense.value - 1
    assert 0 < loss["sparsegpt"] < 0.9 * loss["wanda"]
    assert loss["wanda"] < 0.9 * loss["magnitude"]
