"""Mixtures of experts: each expert's statistics are those of the tokens routed to it, on disk and in memory alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from rich.console import Console as RichConsole
from safetensors.torch import load_file, save_file
from test_families import EXPERTS
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.base.errors import InputError
from llmprune.cli.console import Console
from llmprune.data.windows import Windows
from llmprune.models.discover import find_blocks, make_block
from llmprune.models.experts import experts_per_token, is_experts, observable
from llmprune.models.sites import Site, part_text, read_part
from llmprune.numerics.patterns import NM
from llmprune.numerics.stats import Gram, blend_with_pool
from llmprune.output.verify import verify
from llmprune.reports.page import content
from llmprune.reports.saved import read_runs
from llmprune.solvers import METHODS
from llmprune.steps.weights import batching
from llmprune.stream.activations import Activations

CPU = torch.device("cpu")


def expert_model(family: str, **changes: object) -> PreTrainedModel:
    return tiny_model(family, **(EXPERTS[family] | changes))


def only_experts(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.pool]


def collect(model: PreTrainedModel, windows: Windows, *, all_tokens: bool = False) -> dict[str, Gram]:
    """The Gram of each expert matrix of the last block, as the engine collects it."""
    storage = {name: parameter.dtype for name, parameter in model.named_parameters()}
    blocks = [make_block(i, name, module, storage) for i, (name, module) in enumerate(find_blocks(model).items())]
    feed = Activations.record(model, list(find_blocks(model).values()), windows, batch=2, device=CPU)
    with observable(model, all_tokens=all_tokens):
        for block in blocks[:-1]:
            feed.advance(block)
        stages = [stage for stage in feed.stages(blocks[-1]) if stage[0].pool]
        grams = feed.collect(blocks[-1], stages, lambda stage, device: _Counted(Gram(stage[0].columns, device)))
    return {site.name: counted.gram for stage, counted in zip(stages, grams, strict=True) for site in stage}


class _Counted:
    def __init__(self, gram: Gram) -> None:
        self.gram = gram

    def add(self, x: torch.Tensor, dense: torch.Tensor | None) -> None:
        self.gram.add(x)


def by_hand(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, tuple[int, torch.Tensor]]:
    """The same from a forward of the whole model by transformers' eager code: tokens and inputs of each expert's matrices."""
    found: dict[str, tuple[int, torch.Tensor]] = {}
    name, module = [(name, module) for name, module in model.named_modules() if is_experts(module)][-1]

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        hidden, chosen, _ = [*args, *kwargs.values()]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        for expert in range(module.num_experts):
            x = hidden[(chosen == expert).any(1) & mask.flatten().bool()]
            weight = module.gate_up_proj[expert]
            inner = x @ (weight if module.is_transposed else weight.T)
            inner = module._apply_gate(inner + (module.gate_up_proj_bias[expert] if module.has_bias else 0))
            for matrix, inputs in (("gate_proj", x), ("up_proj", x), ("down_proj", inner)):
                found[f"{name}.{expert}.{matrix}"] = (len(x), inputs.T @ inputs)

    model.set_experts_implementation("eager")
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    model(ids, attention_mask=mask, use_cache=False)
    handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", list(EXPERTS))
def test_statistics_are_of_the_tokens_routed_to_each_expert(family: str) -> None:
    """Padding counts for none."""
    model, ids, mask = expert_model(family), tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, 10:] = 0
    expected, found = by_hand(model, ids, mask), collect(model, Windows(ids, "test", mask))
    assert found.keys() == expected.keys()
    for name, (count, gram) in expected.items():
        assert found[name].tokens == count, name
        torch.testing.assert_close(found[name].sum, gram, rtol=1e-4, atol=1e-5)
    down = [count for name, (count, _) in expected.items() if name.endswith("down_proj")]
    assert sum(down) == 26 * (experts_per_token(model.config) or 0)
    everyone = collect(model, Windows(ids, "test", mask), all_tokens=True)
    assert {gram.tokens for gram in everyone.values()} == {26}
    one = next(name for name in found if name.endswith("down_proj"))
    assert float(everyone[one].sum.trace()) > float(found[one].sum.trace())


def test_an_expert_leans_on_the_pool_the_fewer_tokens_it_saw() -> None:
    few, many, none = (Gram(8, CPU) for _ in range(3))
    few.add(torch.randn(2, 8))
    many.add(torch.randn(4000, 8) * 3)
    own = {gram: gram.mean().clone() for gram in (few, many)}
    pool = (2 * own[few] + 4000 * own[many]) / 4002
    blend_with_pool([few, many, none], 8)
    torch.testing.assert_close(few.mean(), (2 * own[few] + 8 * pool) / 10)
    torch.testing.assert_close(many.mean(), own[many], rtol=0.01, atol=0.01)
    torch.testing.assert_close(none.mean(), pool)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("recipe", [{"method": "wanda"}, {"quality": "balanced"}, {"quality": "best"}], ids=str)
def test_an_expert_that_no_token_chose_is_pruned_all_the_same(family: str, recipe: dict, saved, tmp_path: Path) -> None:
    source = saved(expert_model(family, num_local_experts=16))
    options = {"sparsity": "2:4", "calibration": tokens(2, 4), "batch_size": 1, **recipe}
    record = llmprune.prune(source, output=tmp_path / "out", **options).record
    seen = {site.name: site.tokens for site in record.sites if ".experts." in site.name}
    assert min(seen.values()) == 0
    assert all(site.notes["pool_share"] == pytest.approx(site.shape[1] / (site.tokens + site.shape[1]))
               for site in record.sites if site.name in seen)  # fmt: skip
    assert len(seen) == 3 * 16 * 3
    assert {site.name for site in record.sites if site.error is None} == {name for name, count in seen.items() if not count}
    known = [site.error for site in record.sites if site.error is not None]
    assert record.output_error() == pytest.approx(sum(known) / len(known))
    assert verify(tmp_path / "out").problems == ()
    whole = llmprune.prune(source, **options).model
    assert whole is not None
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(streamed[name], tensor), name
    record = llmprune.prune(source, **options, all_experts=True).record
    assert {site.tokens for site in record.sites} == {8}


def test_what_no_token_reached_is_not_shown_as_without_error(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the terminal, on the report's page and where neurons are removed."""
    source, given = saved(expert_model("mixtral", num_local_experts=16)), {"calibration": tokens(2, 4), "batch_size": 1}
    with Console(RichConsole(width=200), each_site=True) as console:
        record = llmprune.prune(source, output=tmp_path / "w", sparsity="2:4", method="wanda", progress=console, **given).record
    shown = capsys.readouterr().out
    assert shown.count("output error unknown (no token reached it)") == sum(site.error is None for site in record.sites) > 0
    assert "of 16; no token reached the others)" in shown
    (page,) = content(read_runs([str(tmp_path / "w")]))["runs"]
    assert page["facts"]["output_error"]["value"] == pytest.approx(record.output_error())
    gone = llmprune.prune(source, output=tmp_path / "n", neurons="50%", **given).record.removals
    assert any(removal.error is None for removal in gone)
    assert all(removal.error for removal in gone if removal.error is not None)


def test_what_routes_is_left_alone(saved, tmp_path: Path) -> None:
    source = saved(expert_model("qwen2_moe"))
    record = llmprune.prune(
        source, output=tmp_path / "out", sparsity="50%", method="magnitude", calibration=tokens(2, 8)
    ).record
    assert {name.rpartition(".")[0].rpartition(".")[2]: why for name, why in record.skipped.items()} == {
        "gate": "router",
        "shared_expert_gate": "router",
    }
    assert all(site.sparsity == pytest.approx(0.5, abs=0.01) for site in record.sites)


def test_first_expert_matches_its_solver(saved) -> None:
    """The weights are those that the method gives for the expert's Gram and the pool's together."""
    model = expert_model("mixtral")
    dense = model.model.layers[0].mlp.experts.down_proj[1].detach().clone()
    ids = tokens(4, 16)
    llmprune.prune(model, sparsity="2:4", method="sparsegpt", calibration=ids, batch_size=4, only=["*.0.*.experts.*.down_proj"])
    fresh = expert_model("mixtral")
    fresh.config.num_hidden_layers = 1
    del fresh.model.layers[1:]
    with torch.no_grad():
        grams = {name: gram for name, gram in collect(fresh, Windows(ids, "t")).items() if name.endswith("down_proj")}
    blend_with_pool(list(grams.values()), dense.shape[1])
    expected = METHODS.get("sparsegpt").solve(dense, grams["model.layers.0.mlp.experts.1.down_proj"], NM(2, 4)).weight
    torch.testing.assert_close(model.model.layers[0].mlp.experts.down_proj[1].detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "recipe", [{"method": "admm"}, {"quality": "fast"}, {"quality": "fast", "true_sequential": False}], ids=str
)
def test_experts_are_solved_in_batches_as_one_by_one(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"sparsity": "2:4", "calibration": tokens(6, 32), "batch_size": 2, **recipe}
    together, apart = expert_model("qwen3_moe"), expert_model("qwen3_moe")
    records = {site.name: site for site in llmprune.prune(together, **options).record.sites}
    monkeypatch.setattr(batching, "_BATCH_BYTES", {"cpu": 1})
    for site in llmprune.prune(apart, **options).record.sites:
        if site.block == 0:  # later blocks see what float32 made of near ties, and route by it
            assert records[site.name].tokens == site.tokens
            assert records[site.name].notes.get("pool_share") == site.notes.get("pool_share")
            assert records[site.name].error == pytest.approx(site.error, rel=0.02)


def test_verify_names_the_expert(saved, tmp_path: Path) -> None:
    """In a fused tensor, too."""
    llmprune.prune(saved(expert_model("gpt_oss")), output=tmp_path / "out", sparsity="2:4", calibration=tokens(2, 16))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    file = next(file for file in (tmp_path / "out").glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name][3, :4, 1] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    problems = verify(tmp_path / "out").problems
    assert [problem.split(":")[0] for problem in problems] == [file.name, f"{name}[3, "]
    assert f"{name}[3, :, 1::2]: not 2:4: row 0, columns 0 to 3: 4 nonzeros" in problems[1]


@pytest.mark.parametrize("part", [(), (3,), (3, slice(0, 16)), (0, slice(None), slice(1, None, 2))], ids=str)
def test_parts_read_back(part: tuple) -> None:
    assert read_part(part_text(part)) == part


@pytest.mark.parametrize(("change", "words"), [
    (lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"), "in part only"),
    (lambda tensors: tensors.update({"model.layers.0.block_sparse_moe.experts.4.w1.weight": torch.ones(48, 32)}), "4 experts"),
    (lambda tensors: tensors.update({"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.ones(48, 8)}), r"\[48, 8\]"),
])  # fmt: skip
def test_checkpoints_that_lack_part_of_an_expert_are_refused(change, words: str, tmp_path: Path) -> None:
    expert_model("mixtral").save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=words):
        llmprune.prune(tmp_path / "source", output=tmp_path / "out", sparsity="2:4", calibration=tokens(2, 8))
    assert not (tmp_path / "out").exists()
