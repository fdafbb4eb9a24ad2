"""Which matrices are pruned; what is refused says how to leave out what cannot be."""

from __future__ import annotations

import shlex

import pytest
from conftest import tiny_model

from llmprune.base.errors import InputError
from llmprune.numerics.patterns import parse
from llmprune.steps.weights.selection import select_sites
from llmprune.stream.source import ModelSource


def test_all_that_cannot_have_a_pattern_is_left_out_by_one_line_to_paste() -> None:
    blocks = list(ModelSource(tiny_model("llama", hidden_size=30, num_attention_heads=6, head_dim=8)).blocks())
    with pytest.raises(InputError) as caught:
        select_sites(blocks, parse("2:4"), only=(), skip=())
    message = str(caught.value)
    assert message.startswith(
        "5 kinds of matrices cannot be 2:4 (q_proj, k_proj, v_proj, gate_proj, up_proj: its width of 30 columns is not a "
        "multiple of 4); leave them out with: --skip "
    )
    words = shlex.split(message.partition("leave them out with: ")[2])
    assert words == ["--skip", "*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"]
    selection = select_sites(blocks, parse("2:4"), only=(), skip=words[1:])
    assert {name.rpartition(".")[2] for name in selection.patterns} == {"o_proj", "down_proj"}


def test_of_matrices_of_one_name_only_those_that_cannot_are_left_out() -> None:
    """As where layers differ in size."""
    wide, narrow = (list(ModelSource(tiny_model("llama", intermediate_size=size)).blocks()) for size in (48, 45))
    blocks = [wide[0], narrow[1], wide[2]]
    with pytest.raises(InputError, match=r"^1 kind of matrices .*with: --skip model\.layers\.1\.mlp\.down_proj$") as caught:
        select_sites(blocks, parse("2:4"), only=(), skip=())
    left_out = str(caught.value).split()[-1]
    assert list(select_sites(blocks, parse("2:4"), only=(), skip=[left_out]).skipped) == [left_out]


def test_where_none_can_another_pattern_is_asked_for() -> None:
    blocks = list(ModelSource(tiny_model("llama")).blocks())
    with pytest.raises(InputError, match=r"^7 kinds of matrices cannot be 3:7 .*: choose another sparsity$"):
        select_sites(blocks, parse("3:7"), only=(), skip=())
