"""The bundled model is small, says how it was made, and behaves like a large one under pruning."""

from __future__ import annotations

import json
import math
from pathlib import Path

from llmprune.models.checkpoint import Checkpoint
from llmprune.models.resolve import BUNDLED
from llmprune.models.skeleton import load_config
from llmprune.runs.compare import compare

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


def test_methods_rank_as_on_large_models(tmp_path: Path) -> None:
    """Dense, then SparseGPT, Wanda, magnitude, with clear gaps, on text that neither training nor calibration saw."""
    methods = ("sparsegpt", "wanda", "magnitude")
    cells = compare(
        ["llama"], tmp_path / "compare.json", methods=methods, patterns=("50%", "2:4"), samples=32, windows=64, seqlen=128
    )
    for pattern in ("50%", "2:4"):
        loss = {cell["method"]: math.exp(cell["excess_loss"]) - 1 for cell in cells if cell["sparsity"] == pattern}
        assert 0 < loss["sparsegpt"] < 0.9 * loss["wanda"]
        assert loss["wanda"] < 0.9 * loss["magnitude"]
