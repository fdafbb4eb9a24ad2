"""Channels are permuted without changing what a model computes, into an order in which an N:M mask costs less."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from test_families import ALL
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.processes import Ranks
from llmprune.data.windows import Windows
from llmprune.job.job import Job
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.skeleton import Skeleton, load_config
from llmprune.numerics.grouping import DAMPING, Costs, find_order
from llmprune.numerics.patterns import NM, parse
from llmprune.numerics.rotation import Neighbours
from llmprune.output.shards import ShardWriter
from llmprune.output.verify import verify
from llmprune.steps.base import Work
from llmprune.steps.channels.looking import Looked, Looking
from llmprune.steps.channels.moves import Moved
from llmprune.steps.channels.permuting import Permuting
from llmprune.steps.channels.step import untie
from llmprune.steps.weights.step import PruneWeights, choose

IDS = tokens(6, 24)
PLAIN = {"calibration": IDS, "batch_size": 2, "sparsity": "2:4", "method": "sparsegpt"}
KINDS = {"neurons", "values", "hidden"}
# what keeps its order, where that is not nothing: no such part, or one matrix for q, k and v
LEFT: dict[str, set[str]] = {
    **{
        family: {"values"}
        for family in ("opt", "gpt2", "gpt_neox", "gpt_neo", "bloom", "falcon", "mpt", "deepseek_v3", "qwen3_next")
    },
    "phi3": {"neurons", "values"},
    **dict.fromkeys(("gptj", "codegen"), KINDS),
    "gpt_oss": {"neurons"},
    "llama4_text": {"hidden"},
}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(columns: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs of which some can stand in for others."""
    x = torch.randn(200, columns, generator=random()) @ (
        torch.eye(columns) + 0.6 * torch.randn(columns, columns, generator=random(1))
    )
    return torch.randn(rows, columns, generator=random(2)), x


def lost(w: torch.Tensor, gram: torch.Tensor, dropped: list[int]) -> float:
    """The least of (w - v) H (w - v) over v that is zero at `dropped`, by solving for v; float64."""
    kept = [j for j in range(len(w)) if j not in dropped]
    h, target = gram.double(), gram.double() @ w.double()
    v = torch.zeros_like(w, dtype=torch.float64)
    v[kept] = torch.linalg.solve(h[kept][:, kept], target[kept])
    return float((w - v) @ h @ (w - v))


def mask_cost(w: torch.Tensor, gram: torch.Tensor, order: list[int], pattern: NM) -> float:
    """The cheapest set of each group of each row, one group at a time."""
    groups = [order[i : i + pattern.m] for i in range(0, len(order), pattern.m)]
    return sum(min(lost(row, gram, list(d)) for d in combinations(g, pattern.m - pattern.n)) for row in w for g in groups)


@pytest.mark.parametrize("sparsity", ["2:4", "1:4", "3:4", "1:2"])
def test_costs_are_those_of_solving_without_the_dropped(sparsity: str) -> None:
    pattern = parse(sparsity)
    assert isinstance(pattern, NM)
    w, x = problem(12)
    gram = x.T @ x / len(x)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(12)
    found = find_order([Costs.of(w, gram)], pattern.m, pattern.m - pattern.n, random())
    assert found.before == pytest.approx(mask_cost(w, damped, list(range(12)), pattern), rel=1e-3)
    assert found.after == pytest.approx(mask_cost(w, damped, found.columns.tolist(), pattern), rel=1e-3)
    assert found.after < 0.97 * found.before
    assert sorted(found.columns.tolist()) == list(range(12))


def test_two_groups_are_dealt_out_in_the_best_way() -> None:
    """By brute force over all ways, and of two matrices at once."""
    w, x = problem(8)
    gram, other = x.T @ x / len(x), torch.eye(8)
    both = [Costs.of(w, gram), Costs.of(w.flip(0), other)]
    found = find_order(both, 4, 2, random())

    def cost(order: list[int]) -> float:
        damped = [one + DAMPING * one.diagonal().mean() * torch.eye(8) for one in (gram, other)]
        return mask_cost(w, damped[0], order, NM(2, 4)) + mask_cost(w.flip(0), damped[1], order, NM(2, 4))

    ways = [[*half, *(j for j in range(8) if j not in half)] for half in combinations(range(8), 4)]
    assert found.after == pytest.approx(min(map(cost, ways)), rel=1e-3)


def test_columns_that_are_one_group_or_cannot_gain_stay() -> None:
    w, x = problem(4)
    assert find_order([Costs.of(w, x.T @ x)], 4, 2, random()).columns.tolist() == [0, 1, 2, 3]
    same = Costs.of(torch.ones(3, 16), torch.eye(16))
    found = find_order([same], 4, 2, random())
    assert found.after == pytest.approx(found.before)


def looked(folder: Path, kind: type[Looking] = Permuting) -> tuple[Skeleton, Looked]:
    """What a look at the model finds."""
    skeleton = Skeleton(Checkpoint(folder), load_config(folder), torch.device("cpu"), torch.float32)
    job = Job(PruneConfig.create({"model": "-", "sparsity": "2:4", "batch_size": 2}), None, Progress(), Ranks())
    sites = frozenset(choose(job, skeleton.describe()).patterns)
    work, outside = Work.on_disk(skeleton, None), skeleton.outside_blocks()
    with torch.no_grad():
        return skeleton, kind(job, work, skeleton.describe, outside, sites, Neighbours(4, 2)).look(Windows(IDS, "given"))


def write(skeleton: Skeleton, found: Looked, into: Path) -> PreTrainedModel:
    into.mkdir()
    writer = ShardWriter(Moved(skeleton, found.moves, found.copies), into, set())
    for block in skeleton.describe():
        writer.put(block)
    writer.finish()
    skeleton.model.config.save_pretrained(into)
    if found.copies:
        untie(into)
    return AutoModelForCausalLM.from_pretrained(into)


@pytest.mark.parametrize("family", list(ALL))
def test_a_permuted_model_computes_the_same(family: str, saved, tmp_path: Path) -> None:
    model = tiny_model(family, **ALL[family])
    folder = saved(model)
    skeleton, found = looked(folder)
    again = write(skeleton, found, tmp_path / "permuted")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)
    assert found.costs.keys() == KINDS - LEFT.get(family, set()), found.left
    assert {what.split(" ")[0] for what in found.left} >= LEFT.get(family, set())
    before, after = (dict(c.read(list(c.tensors))) for c in (Checkpoint(folder), Checkpoint(tmp_path / "permuted")))
    assert before.keys() == after.keys()
    moved = {piece.disk for name in found.moves for piece in skeleton.names[name]}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != (name in moved), name
        assert torch.equal(tensor.flatten().sort().values, after[name].flatten().sort().values), name


def test_a_block_that_would_compute_something_else_keeps_its_order(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the names mislead: here the rows of up stay where they are."""
    from llmprune.steps.channels import permuting

    def half(block, group, order):
        return {name: moves for name, moves in of_neurons(block, group, order).items() if "up_proj" not in name}

    of_neurons = permuting.of_neurons
    monkeypatch.setattr(permuting, "of_neurons", half)
    _, found = looked(saved(tiny_model("llama")))
    assert len([what for what in found.left if what.startswith("neurons of ")]) == 3
    assert not any("mlp.up_proj" in name and move.dim == 0 for name, moves in found.moves.items() for move in moves)


def test_each_block_keeps_the_way_in_which_it_computes_the_same(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only some blocks have norms of queries as wide as the hidden states: here the second is right the other way."""
    from llmprune.steps.channels import permuting

    def other_way(block, width, order, *, inner):
        return of_norms(block, width, order, inner=True) if inner != (block.index == 1) else {}

    of_norms = permuting.of_norms
    monkeypatch.setattr(permuting, "of_norms", other_way)
    model = tiny_model("llama")
    skeleton, found = looked(saved(model))
    assert "hidden" in found.costs
    with torch.no_grad():
        torch.testing.assert_close(
            write(skeleton, found, tmp_path / "permuted")(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pruned_after_permuting(dtype: torch.dtype, saved, tmp_path: Path, read_elsewhere) -> None:
    source, out = saved(tiny_model("llama").to(dtype)), tmp_path / "out"
    record = llmprune.prune(source, output=out, permute=True, **PLAIN).record
    assert verify(out).problems == ()
    assert read_elsewhere(out)["amiss"] == {}
    assert all(site.sparsity == pytest.approx(0.5) for site in record.sites)
    assert record.channels["permuted"]["costs"].keys() == KINDS
    assert record.channels["permuted"]["left"] == {}
    assert all(cost["after"] < cost["before"] for cost in record.channels["permuted"]["costs"].values())
    plain = llmprune.prune(source, output=tmp_path / "plain", **PLAIN).record
    assert plain.channels == {}
    assert sum(site.error for site in record.sites) < sum(site.error for site in plain.sites)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "source"], "nothing is left beside"
    for options in ({"train": "blocks"}, {"rewind": str(source)}):  # both go by the dense model's own order
        with pytest.raises(InputError, match="needs the channels of"):
            llmprune.recover(out, output=tmp_path / "trained", tokens="2K", **options)


def test_an_unfinished_run_goes_on_from_the_permuted_model(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, notes = saved(tiny_model("llama")), []
    expected = llmprune.prune(source, output=tmp_path / "whole", permute=True, **PLAIN)

    class Telling(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    with monkeypatch.context() as patch:
        patch.setattr(PruneWeights, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llmprune.prune(source, output=tmp_path / "out", permute=True, **PLAIN)
    with monkeypatch.context() as patch:
        patch.setattr(Looking, "look", lambda *_: pytest.fail("looked again"))
        run = llmprune.prune(source, output=tmp_path / "out", permute=True, progress=Telling(), **PLAIN)
    assert any("the permuted model is there from an earlier run" in note for note in notes)
    assert run.record.channels == expected.record.channels
    one, other = (Checkpoint(tmp_path / name) for name in ("whole", "out"))
    for name, tensor in one.read(list(one.tensors)):
        assert torch.equal(tensor, dict(other.read([name]))[name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_model_in_memory_as_on_disk(family: str, saved, tmp_path: Path) -> None:
    model = tiny_model(family, **ALL[family])
    source = saved(model)
    streamed = llmprune.prune(source, output=tmp_path / "out", permute=True, **PLAIN)
    run = llmprune.prune(model, permute=True, **PLAIN)
    assert run.record.channels == streamed.record.channels
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_all_steps_in_order(saved, tmp_path: Path) -> None:
    source = saved(tiny_model("llama"))
    options = PLAIN | {"neurons": "25%", "round_to": 4, "rotate": True, "permute": True, "bits": 8, "group_size": 4}
    record = llmprune.prune(source, output=tmp_path / "out", **options).record
    assert record.channels["permuted"]["costs"].keys() == KINDS
    assert list(record.channels) == ["rotated", "permuted"]
    assert record.removals
    assert record.codes
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out", "source"], "nothing is left beside"
    assert verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "50%"}, "permute has no effect here"),
        ({"sparsity": "4:8"}, "groups of at most 4"),
        ({"sparsity": "4:8", "output": None}, "groups of at most 4"),
    ],
)
def test_what_cannot_be_permuted(options: dict, message: str, saved, tmp_path: Path) -> None:
    asked = PLAIN | {"output": tmp_path / "out", "permute": True} | options
    with pytest.raises(InputError, match=message):
        llmprune.prune(saved(tiny_model("llama")), **asked)
    assert not (tmp_path / "out").exists()
