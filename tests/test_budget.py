"""One budget of parameters: what the dense model is probed for, how the budget is spread, and what comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import tokens
from hypothesis import given
from hypothesis import strategies as st
from test_structured import OPTIONS, PLAIN, Notes, close, model_of
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.notation import Allowance
from llmprune.base.processes import Ranks
from llmprune.data.windows import Texts, Windows
from llmprune.job.job import Job
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.groups import heads, neurons
from llmprune.models.heads import Heads
from llmprune.models.skeleton import Skeleton, load_config
from llmprune.steps.structured.allocate import Curve, Part, allocate, in_nats
from llmprune.steps.structured.scouting import Scouted
from llmprune.steps.structured.spread import Choice, Layer, Program, Shape
from llmprune.steps.structured.step import RemoveStructure
from llmprune.stream.source import ModelSource


def curve(generator: torch.Generator, most: int, step: int) -> Curve:
    """Convex, as removing the least first is."""
    losses = torch.rand(most // step, generator=generator).sort().values.cumsum(0)
    return Curve(range(0, most + 1, step), [0.0, *losses.tolist()])


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [Part(curve(generator, 10, 2), 2, 2) for _ in range(3)]
    found = allocate(parts, 12)

    def lost(counts: tuple[int, ...]) -> float:
        return sum(part.curve.at(count) for part, count in zip(parts, counts, strict=True))

    every = [counts for counts in itertools.product(range(0, 11, 2), repeat=3) if sum(counts) == 12]
    assert lost(tuple(found)) == pytest.approx(min(map(lost, every)))


def test_allocation_stops_where_nothing_is_left() -> None:
    cheap = Curve([0, 1, 2], [0.0, 0.3, 0.6])
    assert allocate([Part(cheap, 2, 2)], 100) == [2]
    assert allocate([Part(cheap, 1, 1), Part(cheap.scaled(2), 1, 1)], 3) == [2, 1]


def choices(own: Curve, counts: Sequence[int], *prices: float) -> list[Choice]:
    return [Choice(gone, own.at(gone), [price * gone for price in prices]) for gone in counts]


COUNTS = {"heads": (0, 1, 3), "neurons": range(0, 13, 4)}


def some_layers(generator: torch.Generator, *, uneven: bool) -> list[Layer]:
    """Three, with two resources; `uneven`: their prices differ."""
    found = []
    for number in range(3):
        more = 1 + number * uneven
        parts = {
            "heads": choices(curve(generator, 3, 1), COUNTS["heads"], 10 * more, 3),
            "neurons": choices(curve(generator, 12, 2), COUNTS["neurons"], 4 * more, 2.5),
        }
        found.append(Layer(float(torch.rand((), generator=generator)) * 4, (100 * more, 50), parts))
    return found


def every_shape(layers: Sequence[Layer], *, equal: bool) -> Iterator[tuple[float, list[float]]]:
    """What each loses and leaves of the two resources: all sets of layers, all numbers of heads and neurons."""
    for kept in itertools.product((False, True), repeat=len(layers)):
        stay = [layer for layer, keep in zip(layers, kept, strict=True) if keep]
        pairs = list(itertools.product(range(3), range(4)))
        for picked in [[pair] * len(stay) for pair in pairs] if equal else itertools.product(pairs, repeat=len(stay)):
            gone = [
                choice
                for layer, (head, neuron) in zip(stay, picked, strict=True)
                for choice in (layer.parts["heads"][head], layer.parts["neurons"][neuron])
            ]
            lost = sum(layer.loss for layer, keep in zip(layers, kept, strict=True) if not keep)
            left = [sum(layer.costs[i] for layer in stay) - sum(choice.saves[i] for choice in gone) for i in range(2)]
            if stay:
                yield lost + sum(choice.loss for choice in gone), left


def costs(layers: Sequence[Layer], shape: Shape) -> list[float]:
    stay = [layer for number, layer in enumerate(layers) if number not in shape.dropped]
    saves = [
        next(choice.saves for choice in layer.parts[kind] if choice.gone == count)
        for layer, gone in zip(stay, shape.gone, strict=True)
        for kind, count in gone.items()
    ]
    return [sum(layer.costs[i] for layer in stay) - sum(own[i] for own in saves) for i in range(2)]


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_the_best_of_all_within_both_budgets(seed: int, equal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = some_layers(generator, uneven=seed % 2 == 1)
    first, second = (float(torch.rand((), generator=generator)) * 0.8 + 0.1 for _ in range(2))
    most = [first * sum(layer.costs[0] for layer in layers), second * 150]
    lost = [loss for loss, left in every_shape(layers, equal=equal) if left[0] <= most[0] and left[1] <= most[1]]
    found = Program(layers, ["heads", "neurons"], most, equal=equal).best()
    if not lost:
        assert found is None
        return
    assert found is not None
    assert found.loss == pytest.approx(min(lost), abs=1e-6)
    assert all(cost <= limit + 1e-6 for cost, limit in zip(costs(layers, found), most, strict=True))
    assert not equal or all(gone == found.gone[0] for gone in found.gone)


@pytest.mark.parametrize("equal", [True, False])
def test_what_does_not_load_is_followed_by_the_next_best(equal: bool) -> None:
    layers = some_layers(torch.Generator().manual_seed(3), uneven=False)
    program, seen = Program(layers, ["heads", "neurons"], [200, 1e9], equal=equal), []
    for _ in range(4):
        found = program.best()
        assert found is not None
        program.forbid(found)
        seen.append(found)
    sizes = {(() if equal else tuple(one.dropped), str(one.gone[:1] if equal else one.gone)) for one in seen}
    assert len(sizes) == 4
    assert [one.loss for one in seen] == sorted(one.loss for one in seen)


def test_own_sizes_lose_no_more_than_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    curves = [curve(generator, 12, 2).scaled(factor) for factor in (1, 2, 9)]
    layers = [Layer(9.0, [100], {"neurons": choices(one, range(0, 13, 2), 4)}) for one in curves]
    equal, own = (Program(layers, ["neurons"], [300 - 72], equal=same).best() for same in (True, False))
    assert equal is not None
    assert own is not None
    assert own.loss < equal.loss
    assert [one["neurons"] for one in equal.gone] == [6, 6, 6]
    assert Program(layers, ["neurons"], [10], equal=False).best() is None


@pytest.mark.parametrize(
    ("text", "left"), [("75%", 750), ("0.75", 750), ("600", 600), ("0.5K", 500), (" 12.5 % ", None), ("12.5%", 125)]
)
def test_budgets(text: str, left: int | None) -> None:
    if left is None:
        with pytest.raises(InputError, match=r"give a share to keep such as 75%, or a number such as 6\.5B"):
            Allowance.parse(text).of(1000)
    else:
        assert Allowance.parse(text).of(1000) == left


@given(st.text(alphabet="0123456789.%KMBkmb -", max_size=8), st.integers(1, 10**12))
def test_a_budget_is_a_number_below_all_or_an_error(text: str, whole: int) -> None:
    try:
        left = Allowance.parse(text).of(whole)
    except InputError:
        left = 0
    assert 0 <= left < whole


def sure_of(family: str) -> PreTrainedModel:
    """A random model whose predictions are far from uniform, so that what is removed from it is missed."""
    model = model_of(family, **({"n_inner": 48} if family == "gpt2" else {}))
    last = next(module for name, module in model.named_modules() if name.endswith(("model.norm", "ln_f")))
    last.weight.data *= 4
    return model


def own_text(model: PreTrainedModel) -> dict[str, object]:
    """Calibration windows drawn from the model: none predicts them better than it does."""
    torch.manual_seed(0)
    lengths = {"min_new_tokens": 20, "max_new_tokens": 20}
    ids = model.generate(tokens(64, 4), do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0, **lengths)
    return OPTIONS | {"calibration": ids}


def scouted(folder: Path, ids: torch.Tensor, **options: object) -> Scouted:
    skeleton = Skeleton(Checkpoint(folder), load_config(folder), torch.device("cpu"), torch.float32)
    config = PruneConfig.create({"model": "-", "round_to": 4, "batch_size": 2, **options})
    step = RemoveStructure(Job(config, None, Progress(), Ranks()), skeleton, None)
    return step.scout(Texts(Windows(ids, "given"), None, ()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_probes_lose_what_the_whole_model_loses(family: str, saved) -> None:
    """The divergence without each layer, against the model in memory."""
    model, ids = model_of(family), tokens(6, 24)
    with torch.no_grad():
        found = scouted(saved(model), ids, target_params="85%")
    with torch.no_grad():
        dense = functional.log_softmax(model(ids).logits[:, :-1], -1)
    stack = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 3)
    whole = list(stack)
    for number, drop in enumerate(found.drops):
        kept = [layer for layer in whole if layer is not whole[number]]
        owner = next(module for module in model.modules() if any(child is stack for child in module.children()))
        name = next(name for name, child in owner.named_children() if child is stack)
        setattr(owner, name, torch.nn.ModuleList(kept))
        model.config.num_hidden_layers = 2
        with torch.no_grad():
            own = functional.log_softmax(model(ids, use_cache=False).logits[:, :-1], -1)
        assert drop == pytest.approx(float((dense.exp() * (dense - own)).sum(-1).mean()), abs=1e-5)
        model.config.num_hidden_layers = 3
        setattr(owner, name, stack)


def test_curves_in_nats_go_through_what_was_measured() -> None:
    curves = [Curve([0, 2, 4], [0.0, 1.0, 3.0]), Curve([0, 2, 4], [0.0, 1.0, 4.0])]
    found = in_nats(curves, 2, [0.4, 0.2])
    assert [one.at(2) for one in found] == pytest.approx([0.4, 0.2])
    assert found[1].at(4) == pytest.approx(4 * found[1].at(2))
    nothing = Curve([0, 2, 4], [0.0, 0.0, 7.0])
    assert in_nats([*curves, nothing], 2, [0.4, 0.2, 0.0])[2].at(4) == pytest.approx(7 * 0.3 / 10)
    assert in_nats([nothing], 2, [0.0])[0].at(4) == pytest.approx(0.7)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_budget_is_kept_by_removing_what_nothing_reads(family: str, per_layer: bool, saved, tmp_path: Path) -> None:
    """Half of the neurons, and one group of heads, are read by nothing: the budget just needs them all."""
    model = sure_of(family)
    parameters = 0
    for block in ModelSource(model).blocks():
        for group in neurons(block):
            unread = [i for i in range(group.count) if i % 8 < 4]
            group.consumer.weight[:, unread] = 0
            parameters += len(unread) * (group.consumer.rows + sum(site.columns for site in group.producers))
        if family in ("llama", "mixtral"):
            group = heads(block, Heads.of(model.config), whole=True)
            group.consumer.weight[:, 16:] = 0
            parameters += 16 * group.consumer.rows + sum(site.rows // 2 * site.columns for site in group.producers)
    whole = model.num_parameters()
    budget = whole - parameters
    notes, text = Notes(), own_text(model)
    record = llmprune.prune(
        saved(model), output=tmp_path / "out", target_params=str(budget), per_layer=per_layer, progress=notes, **text
    ).record
    assert record.structure["after"]["parameters"] <= budget
    assert record.structure["removed_layers"] == []
    assert close(model, llmprune.load(tmp_path / "out", device="cpu"))
    (told,) = [note for note in notes.notes if note.startswith("within the budget stay 3 of 3 layers")]
    left = record.structure["after"]["parameters"]
    assert told.endswith(f": {left:,} of {whole:,} parameters ({left / whole:.1%})")
    if not per_layer:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() <= budget


def test_a_layer_that_does_nothing_goes_first(saved, tmp_path: Path) -> None:
    model = sure_of("llama")
    for block in list(ModelSource(model).blocks())[1:2]:
        for group in (*neurons(block), heads(block, Heads.of(model.config), whole=True)):
            group.consumer.weight[:] = 0
    layer = sum(parameter.numel() for parameter in model.model.layers[1].parameters())
    budget = str(model.num_parameters() - layer)
    options = {"target_params": budget, "score": "gradient", "sparsity": "2:4", "method": "magnitude"}
    record = llmprune.prune(saved(model), output=tmp_path / "out", **(own_text(model) | options)).record
    assert record.structure["removed_layers"] == [1]
    assert len(record.sites) == 14
    assert f"{budget} of its parameters" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("options", "words"), [
    ({"target_params": "100%"}, "leaves all of the"),
    ({"target_params": "5B"}, "leaves all of the"),
    ({"target_params": "most"}, "give a share to keep such as 75%"),
    ({"target_params": "0%"}, "give a share to keep such as 75%"),
    ({"target_params": "10%"}, "one layer at its smallest and all that is outside the layers are"),
    ({"target_params": "75%", "heads": "25%"}, "target_params and heads cannot be combined"),
    ({"target_params": "75%", "layer_score": "loss"}, "layer_score has no effect here"),
    ({"target_params": "75%", "quality": "best"}, "quality has no effect here"),
])  # fmt: skip
def test_bad_budgets_are_one_line_and_nothing_is_written(options: dict, words: str, saved, tmp_path: Path) -> None:
    source = saved(model_of("llama"))
    with pytest.raises(InputError, match=words):
        llmprune.prune(source, output=tmp_path / "out", **(PLAIN | options))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_budget_is_refused_for_layers_of_different_sizes(saved, tmp_path: Path) -> None:
    source = saved(model_of("llama"))
    llmprune.prune(source, output=tmp_path / "out", target_params="85%", per_layer=True, **OPTIONS)
    if (load_config(tmp_path / "out")).is_heterogeneous:
        with pytest.raises(InputError, match="has layers of different sizes already"):
            llmprune.prune(tmp_path / "out", output=tmp_path / "again", target_params="85%", **OPTIONS)
