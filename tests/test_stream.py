"""The engine: replay is exact, and streaming gives what pruning the whole model gives, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BatchEncoding, PreTrainedModel

import llmprune
from llmprune.base.errors import InputError
from llmprune.data.windows import Windows, given_windows
from llmprune.models.discover import find_blocks, make_block
from llmprune.models.sites import Block, Site
from llmprune.numerics.patterns import NM, Stacked, parse
from llmprune.numerics.stats import CrossGram, Gram
from llmprune.solvers import METHODS
from llmprune.steps.weights.observing import CORRECTION
from llmprune.stream.activations import KEPT, Activations
from llmprune.stream.capture import Recorder, head
from llmprune.stream.source import ModelSource

CPU = torch.device("cpu")
STAGES = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
}


def blocks_of(model: PreTrainedModel) -> list[Block]:
    return list(ModelSource(model).blocks())


def activations(model: PreTrainedModel, windows: Windows, batch: int = 2) -> Activations:
    return Activations.record(model, list(find_blocks(model).values()), windows, batch=batch, device=CPU)


@torch.no_grad()
def test_replay_is_bit_exact(family: str) -> None:
    model, ids = tiny_model(family), tokens(4, 12)
    feed = activations(model, Windows(ids, "t"))
    blocks = blocks_of(model)
    for block in blocks:
        feed.advance(block)
    modules = [block.module for block in blocks]
    for index, part in enumerate(ids.split(2)):
        assert torch.equal(head(model, modules, feed.hidden[index], input_ids=part), model(part, use_cache=False).logits)


@torch.no_grad()
def test_replay_with_padding_is_bit_exact(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    feed = activations(model, Windows(ids, "t", mask))
    blocks = blocks_of(model)
    for block in blocks:
        feed.advance(block)
    modules = [block.module for block in blocks]
    replayed = head(model, modules, feed.hidden[0], input_ids=ids, attention_mask=mask)
    assert torch.equal(replayed, model(ids, attention_mask=mask, use_cache=False).logits)


@torch.no_grad()
def test_each_block_has_its_own_arguments() -> None:
    """Mixed attention: replaying every block with the first one's arguments would be wrong."""
    model, ids = tiny_model("gemma3_text"), tokens(2, 12)
    modules = list(find_blocks(model).values())
    hidden, calls = Recorder().record(model, modules, input_ids=ids)
    right = wrong = hidden
    for module, call in zip(modules, calls, strict=True):
        right, wrong = call.run(module, right), calls[0].run(module, wrong)
    assert (right - wrong).abs().max() > 1e-3


@torch.no_grad()
def test_equal_arguments_are_kept_once() -> None:
    model, ids = tiny_model("llama"), tokens(6, 12)
    recorder = Recorder()
    for part in ids.split(2):
        recorder.record(model, list(find_blocks(model).values()), input_ids=part)
    assert len(recorder._pool) <= 4  # cosines, sines, positions; not one a batch and block


@torch.no_grad()
def test_stages_group_what_shares_an_input(family: str) -> None:
    model = tiny_model(family)
    feed = activations(model, Windows(tokens(2, 12), "t"))
    for block in blocks_of(model):
        stages = [sorted(site.name.rsplit(".", 1)[-1] for site in stage) for stage in feed.stages(block)]
        assert stages == [sorted(stage) for stage in STAGES.get(family, STAGES["llama"])]
        feed.advance(block)


class Products(TorchDispatchMode):
    """Counts multiplications with matrices that are parameters."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[1].untyped_storage().data_ptr() in self.memory:
            self.count += args[0].numel() * args[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sparsegpt", "annealed"])
def test_no_stage_is_computed_again(method: str) -> None:
    """At most 1.6 passes a block, of which gate and up are nearly all that is more than one, and a batch to look at stages."""
    model, ids = tiny_model("llama"), tokens(32, 12)
    blocks = sum(p.numel() for block in find_blocks(model).values() for p in block.parameters() if p.ndim > 1)
    with Products(model) as products:
        llmprune.prune(model, sparsity="2:4", method=method, calibration=ids, batch_size=2, true_sequential=True)
    assert blocks < products.count / ids.numel() < 1.6 * blocks


def test_what_is_kept_is_bounded_and_goes_with_the_block() -> None:
    model = tiny_model("llama")
    feed, block = activations(model, Windows(tokens(4, 12), "t")), blocks_of(model)[0]

    class Count:
        def add(self, x: Tensor, dense: Tensor | None) -> None: ...

    for stage in feed.stages(block):
        feed.collect(block, [stage], lambda stage, device: Count())
        held = [sum(tensor.nbytes for tensor in place.shelf) for place in feed._held._places.values()]
        assert all(nbytes <= KEPT * feed.hidden[0].nbytes for nbytes in held)
    assert held == [feed.hidden[0].nbytes] * 2  # the residual before gate and up, of each batch
    feed.advance(block)
    assert not feed._held._places


@torch.no_grad()
def test_padding_never_counts() -> None:
    """Windows of 5, 9 and 12 real tokens give the Gram of those tokens run alone."""
    model = tiny_model("llama")
    lengths, ids = (5, 9, 12), tokens(3, 12)
    mask = torch.stack([(torch.arange(12) < n).long() for n in lengths])
    block = blocks_of(model)[0]

    class Counted(Gram):
        def add(self, x: Tensor, dense: Tensor | None = None) -> None:
            super().add(x)

    def grams(feed: Activations) -> list[Counted]:
        return feed.collect(block, feed.stages(block), lambda stage, device: Counted(stage[0].columns, device))

    together = grams(activations(model, Windows(ids, "t", mask), batch=3))
    alone = [grams(activations(model, Windows(ids[i : i + 1, :n], "t"))) for i, n in enumerate(lengths)]
    for stage, padded in enumerate(together):
        for other in alone[1:]:
            alone[0][stage].merge(other[stage])
        assert padded.tokens == sum(lengths)
        torch.testing.assert_close(padded.sum, alone[0][stage].sum, rtol=1e-4, atol=1e-5)


def hooked_gram(model: PreTrainedModel, ids: Tensor, layer: torch.nn.Module, batch: int) -> Gram:
    """The Gram of a layer's inputs in forwards of the whole model."""
    weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
    gram = Gram(weight.shape[1], CPU)
    handle = layer.register_forward_pre_hook(lambda _, args: gram.add(args[0].reshape(-1, args[0].shape[-1])))
    for part in ids.split(batch):
        model(part, use_cache=False)
    handle.remove()
    return gram


def stages_by_hand(model: PreTrainedModel) -> Iterator[tuple[list[Site], list[list[Site]]]]:
    """Each block's sites, and the same by stage, from the table above."""
    for name, module in find_blocks(model).items():
        sites = make_block(0, name, module, {n: p.dtype for n, p in model.named_parameters()}).sites
        order = STAGES.get(model.config.model_type, STAGES["llama"])
        stages = []
        for position, stage in enumerate(order):
            now = [s for s in sites if s.name.rsplit(".", 1)[-1] in stage]
            if model.config.model_type == "gpt2":  # two layers are called c_proj
                now = [s for s in now if (".attn." in s.name) == (position < 2)]
            stages.append(now)
        yield list(sites), stages


def solve_by_hand(stage: list[Site], weights: list[Tensor], gram: Gram, sparsity: str) -> None:
    """SparseGPT on the matrices of a stage, all below each other."""
    rows = tuple(len(w) for w in weights)
    solution = METHODS.get("sparsegpt").solve(torch.cat(weights), gram, Stacked(parse(sparsity), rows))
    for site, weight in zip(stage, solution.weight.split(rows), strict=True):
        site.write(weight)


@torch.no_grad()
def prune_whole(model: PreTrainedModel, ids: Tensor, sparsity: str, batch: int, *, true_sequential: bool) -> None:
    """The reference: no streaming, no replay; a forward of the whole model for every matrix."""
    for sites, stages in stages_by_hand(model):
        found = {site.name: hooked_gram(model, ids, site.module, batch) for site in sites}
        for now in stages:
            if true_sequential:
                found |= {s.name: hooked_gram(model, ids, s.module, batch) for s in now}
            solve_by_hand(now, [site.weight.float() for site in now], found[now[0].name], sparsity)


@pytest.mark.parametrize("true_sequential", [True, False], ids=["stages", "one pass"])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_streamed_equals_whole_model(family: str, sparsity: str, true_sequential: bool, saved, tmp_path: Path) -> None:
    ids = tokens(6, 16)
    folder = saved(tiny_model(family))
    options = {"sparsity": sparsity, "method": "sparsegpt", "calibration": ids, "batch_size": 2}
    options["true_sequential"] = true_sequential
    llmprune.prune(folder, output=tmp_path / "out", **options)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    prune_whole(reference, ids, sparsity, 2, true_sequential=true_sequential)
    in_memory = AutoModelForCausalLM.from_pretrained(folder).eval()
    llmprune.prune(in_memory, **options)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(streamed[name], tensor), f"streamed {name}"
        assert torch.equal(in_memory.state_dict()[name], tensor), f"in memory {name}"


@pytest.mark.parametrize("method", ["wanda", "ria", "dsnot", "sparsegpt", "annealed"])
def test_without_being_told_a_method_goes_through_a_block_as_published(method: str) -> None:
    def pruned(**options: bool) -> dict[str, Tensor]:
        model = tiny_model("llama")
        llmprune.prune(model, sparsity="2:4", method=method, calibration=tokens(6, 16), **options)
        return model.state_dict()

    plain, as_published = pruned(), pruned(true_sequential=method in ("sparsegpt", "annealed"))
    other = pruned(true_sequential=method not in ("sparsegpt", "annealed"))
    assert all(torch.equal(plain[name], as_published[name]) for name in plain)
    assert not all(torch.equal(plain[name], other[name]) for name in plain)


def inputs_of(model: PreTrainedModel, layer: torch.nn.Module, ids: Tensor) -> Tensor:
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


@torch.no_grad()
def prune_whole_corrected(
    model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, batch: int, blocks: Sequence[int]
) -> None:
    """The reference of the corrected target: two whole models side by side."""
    for index, (_, stages) in enumerate(stages_by_hand(model)):
        if index not in blocks:
            continue
        for now in stages:
            gram, cross = Gram(now[0].columns, CPU), CrossGram(now[0].columns, CPU)
            for part in ids.split(batch):
                x = inputs_of(model, now[0].module, part)
                gram.add(x)
                cross.add(x, inputs_of(dense, dense.get_submodule(now[0].name), part))
            target = cross.corrected_target(torch.cat([site.weight for site in now]), gram, CORRECTION)
            solve_by_hand(now, list(target.split([site.rows for site in now])), gram, "2:4")


@pytest.mark.parametrize("blocks", [(0, 1, 2), (0, 2)], ids=["all", "one left alone"])
def test_corrected_target_equals_two_whole_models(family: str, blocks: tuple[int, ...], saved, tmp_path: Path) -> None:
    ids = tokens(6, 16)
    folder = saved(tiny_model(family))
    options = {"method": "sparsegpt", "target": "corrected", "sparsity": "2:4", "calibration": ids, "batch_size": 2}
    llmprune.prune(folder, output=tmp_path / "out", **options, only=[f"*.{block}.*" for block in blocks])
    reference, dense = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    prune_whole_corrected(reference, dense, ids, 2, blocks)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(streamed[name], tensor), name


@pytest.mark.parametrize("recipe", [{"method": "magnitude"}, {"method": "wanda", "refit": True}, {"quality": "fast"},
                                    {"quality": "balanced"}, {"quality": "best"}], ids=str)  # fmt: skip
def test_other_recipes_stream_alike(recipe: dict, saved, tmp_path: Path) -> None:
    folder = saved(tiny_model("qwen3"))
    options = {"sparsity": "2:4", "calibration": tokens(4, 16), "batch_size": 2, **recipe}
    llmprune.prune(folder, output=tmp_path / "out", **options)
    in_memory = llmprune.prune(folder, **options).model
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert in_memory is not None
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(streamed[name], tensor), name


def test_bfloat16_checkpoint_computed_in_bfloat16(saved, tmp_path: Path) -> None:
    folder = saved(tiny_model("llama").to(torch.bfloat16))
    options = {"sparsity": "2:4", "calibration": tokens(4, 16)}
    llmprune.prune(folder, output=tmp_path / "out", dtype="bfloat16", **options)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    llmprune.prune(whole, **options)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in whole.state_dict().items())


def test_what_is_computed_next_is_what_was_saved(saved, tmp_path: Path) -> None:
    """float32 compute on a bfloat16 checkpoint: later blocks must see the rounded weights."""
    folder = saved(tiny_model("llama").to(torch.bfloat16))
    result = llmprune.prune(folder, output=tmp_path / "out", sparsity="2:4", method="sparsegpt", calibration=tokens(4, 16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        gram = hooked_gram(model, tokens(4, 16), model.model.layers[2].mlp.down_proj, 4)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weight = dense.model.layers[2].mlp.down_proj.weight.detach()
    expected = METHODS.get("sparsegpt").solve(weight, gram, NM(2, 4)).weight.to(torch.bfloat16).float()
    torch.testing.assert_close(model.model.layers[2].mlp.down_proj.weight.detach(), expected, rtol=2e-2, atol=2e-3)
    assert result.record.sites[-1].tokens == 4 * 16


def test_only_one_block_is_in_memory(saved, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llmprune.steps.weights.visitor import WeightPruner

    loaded: list[set[str]] = []
    original = WeightPruner.visit

    def spy(self: WeightPruner, block: Block) -> None:
        real = {n for n, p in skeletons[0].model.named_parameters() if p.device.type != "meta"}
        loaded.append(real)
        original(self, block)

    skeletons = []
    from llmprune.models.skeleton import Skeleton

    build = Skeleton.__init__

    def remember(self: Skeleton, *args: object) -> None:
        build(self, *args)  # type: ignore[arg-type]
        skeletons.append(self)

    monkeypatch.setattr(WeightPruner, "visit", spy)
    monkeypatch.setattr(Skeleton, "__init__", remember)
    llmprune.prune(saved(tiny_model("llama")), output=tmp_path / "out", sparsity="2:4", calibration=tokens(4, 16))
    assert [{name.split(".")[2] for name in real} for real in loaded] == [{"0"}, {"1"}, {"2"}]


def test_not_finite_activations_name_the_place(saved) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:] = 1e38
        model.model.layers[1].self_attn.q_proj.weight[:] = 1e10
        model.model.layers[1].self_attn.v_proj.weight[:] = 1e10
    with pytest.raises(InputError, match=r"layers\.1.*NaN or infinity"):
        llmprune.prune(model, sparsity="2:4", calibration=tokens(2, 8))


def test_given_windows() -> None:
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    same = (
        ids,
        ids.numpy(),
        ids.tolist(),
        {"input_ids": ids},
        BatchEncoding({"input_ids": ids.tolist()}),
        [{"input_ids": ids}],
    )
    for given in same:
        windows = given_windows(given)
        assert torch.equal(windows.ids, ids)
        assert windows.mask is None
    rows = [{"input_ids": row.tolist(), "attention_mask": m.tolist()} for row, m in zip(ids, mask, strict=True)]
    for given in (rows, {"input_ids": ids, "attention_mask": mask}):
        windows = given_windows(given)
        assert torch.equal(windows.ids, ids)
        assert windows.tokens() == 20


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["some text"],
        [[1, 2], [1, 2, 3]],
        [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}],
        [{"text": "a"}],
        {"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]},
        {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]},
        torch.rand(2, 3),
        torch.zeros(2, 3, 4, dtype=torch.long),
        torch.zeros(0, 3, dtype=torch.long),
        None,
        (i for i in range(3)),
    ],
    ids=lambda given: f"{type(given).__name__} {given}"[:40] if isinstance(given, (list, dict)) else type(given).__name__,
)
def test_given_windows_that_are_none(given: object) -> None:
    with pytest.raises(InputError, match="calibration samples"):
        given_windows(given)  # type: ignore[arg-type]


class _Elsewhere(torch.nn.Parameter):
    """As a parameter on a second GPU is, which is not there."""

    device = torch.device("cuda:1")


def test_a_model_over_several_devices_is_refused() -> None:
    model = tiny_model("llama")
    model.model.norm.weight = _Elsewhere(model.model.norm.weight.data)
    with pytest.raises(InputError, match="spread over cpu, cuda:1: load it without device_map, or pass its folder"):
        llmprune.prune(model, calibration=tokens(4, 16), sparsity="2:4")


def test_hooks_on_the_instance_survive() -> None:
    """accelerate puts a `forward` on the module itself; recording must put it back."""
    model = tiny_model("llama")
    blocks = list(find_blocks(model).values())
    own = blocks[1].forward
    blocks[1].forward = lambda *args, **kwargs: own(*args, **kwargs)
    hooked = blocks[1].forward
    activations(model, Windows(tokens(2, 8), "t"))
    assert blocks[1].__dict__["forward"] is hooked
    assert "forward" not in blocks[0].__dict__


def test_modules_get_their_own_mode_back() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    llmprune.prune(model, sparsity="2:4", calibration=tokens(2, 8))
    assert model.training
    assert model.model.layers[0].mlp.training
    assert not model.model.layers[1].mlp.training


def test_weights_that_are_not_finite_name_their_site() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 2] = float("nan")
    with pytest.raises(InputError, match=r"the weights of model\.layers\.0\.mlp\.up_proj hold NaN"):
        llmprune.prune(model, sparsity="2:4", calibration=tokens(2, 8))


def test_skipped_sites_are_copied_bit_for_bit(saved, tmp_path: Path) -> None:
    """Even where the compute dtype is narrower than the stored one."""
    folder = saved(tiny_model("llama"))
    llmprune.prune(folder, output=tmp_path / "out", sparsity="2:4", dtype="bfloat16", skip="*.o_proj", calibration=tokens(2, 8))
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, tmp_path / "out"))
    for index in range(3):
        name = f"model.layers.{index}.self_attn.o_proj.weight"
        assert torch.equal(before[name], after[name])
