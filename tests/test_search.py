"""The allocation that tries candidates: against brute force on small problems, and in whole runs, interrupted or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tokens
from test_allocation import SCAN, a_scan, scanned
from test_families import EXPERTS
from test_resume import weights
from torch.nn import functional

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.processes import Ranks
from llmprune.job.progress import Progress
from llmprune.job.scan import Allocation, Scan
from llmprune.numerics.patterns import NM, Unstructured, parse
from llmprune.output.verify import verify
from llmprune.steps.weights import trying
from llmprune.steps.weights.allocate import search
from llmprune.steps.weights.allocate.base import STRIDE, Trials, levels, share
from llmprune.steps.weights.library import Library, group_name, packed, unpacked
from llmprune.stream.source import ModelSource

IDS = tokens(6, 24)
OPTIONS = {"calibration": IDS, "batch_size": 2, "method": "wanda", "sparsity": "50%", "allocate": "search"}
FOUR = a_scan(
    scanned("0.q", nats=0.02), scanned("0.v", nats=0.4), scanned("1.q", block=1, nats=0.1), scanned("1.v", block=1, nats=0.1)
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that end soon: few children, few tokens."""
    for name, value in {"CHILDREN": 6, "ROUNDS": ((48, 3), (96, 1)), "LAST": 144, "STALE": 2, "PENALTIES": (0.0, 0.4)}.items():
        monkeypatch.setattr(search, name, value)


def uneven(allocation: Allocation) -> float:
    """A loss that is no sum: what two matrices of a block lose together counts once more."""
    lost = {name: (1 - share(own)) ** 4 for name, own in allocation.items()}
    return sum(weight * lost[name] for name, weight in {"0.q": 0.2, "0.v": 1.5, "1.q": 0.1, "1.v": 0.9}.items()) + (
        2 * lost["0.q"] * lost["1.q"]
    )


def trials(loss: Callable[[Allocation], float], told: list[Mapping[str, Any]] | None = None, **known: Any) -> Trials:
    def keep(found: Mapping[str, Any]) -> bool:
        if told is not None:
            told.append(found)
        return True

    return Trials(lambda each, tokens: [loss(own) for own in each], 0, known, keep)


def test_finds_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "STALE", 40)
    monkeypatch.setattr(search, "PENALTIES", (0.0, 0.1, 0.2, 0.4, 0.8))
    choices = [levels(one, Unstructured(0.6), STRIDE) for one in FOUR.matrices]
    names = [one.name for one in FOUR.matrices]
    possible = [dict(zip(names, own, strict=True)) for own in itertools.product(*choices)]
    within = [own for own in possible if sum(share(each) for each in own.values()) <= 4 * 0.4 + 1e-9]
    best = min(within, key=uneven)
    assert uneven(best) < 0.95 * uneven(dict.fromkeys(names, Unstructured(0.6)))
    found = search.allocate(FOUR, Unstructured(0.6), trials(uneven))
    assert {name: own.sparsity for name, own in found.items()} == pytest.approx(
        {name: own.sparsity for name, own in best.items()}, abs=0.005
    )


@pytest.mark.parametrize("text", ["50%", "61.3%", "90%"])
def test_exactly_as_many_weights_go(text: str) -> None:
    found = search.allocate(SCAN, parse(text), trials(lambda own: share(own["0.q"]) - 2 * share(own["0.v"])))
    assert found["0.v"].sparsity < found["0.q"].sparsity
    drops = sum(one.sites * round(found[one.name].sparsity * 512) for one in SCAN.matrices)
    assert drops == sum(one.sites * round(parse(text).sparsity * 512) for one in SCAN.matrices)


def test_mixed_patterns_take_no_more_bytes() -> None:
    found = search.allocate(SCAN, NM(2, 4), trials(lambda own: share(own["0.q"]) - 2 * share(own["0.v"])))
    assert found["0.v"] is None
    assert sum(one.weights * share(found[one.name]) for one in SCAN.matrices) <= 0.5625 * sum(o.weights for o in SCAN.matrices)


def test_uniform_stays_where_nothing_is_better() -> None:
    found = search.allocate(SCAN, Unstructured(0.5), trials(lambda own: float(len(set(own.values())))))
    assert set(found.values()) == {Unstructured(0.5)}


def test_a_search_goes_on_where_it_was() -> None:
    told: list[Mapping[str, Any]] = []
    whole = search.allocate(FOUR, Unstructured(0.6), trials(uneven, told))
    for earlier in told[:-1]:
        assert search.allocate(FOUR, Unstructured(0.6), trials(uneven, **earlier)) == whole


def test_masks_are_packed() -> None:
    for count in (1, 8, 13):
        mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
        assert packed(mask).numel() == -(-count // 8)
        assert torch.equal(unpacked(packed(mask), count), mask)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_candidates_are_measured_as_whole_models(family: str, saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's weights put into the model; of those that are alike up to a block, too."""
    model = tiny_model(family, num_hidden_layers=2, **EXPERTS.get(family, {}))
    seen: list[tuple[Allocation, float]] = []
    measured = trying.Trial.measured

    def watched(self: trying.Trial, allocations: Sequence[Allocation], tokens: int) -> list[float]:
        found = measured(self, allocations, tokens)
        if not seen:
            blocks = list(self.work.source.blocks())
            for own, nats in zip(allocations, found, strict=True):
                seen.append((own, nats))
                dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                for block in blocks:
                    for site in block.sites:
                        pattern = own[group_name(site)]
                        site.write(self.library.get(group_name(site), pattern, [site])[0])
                        assert float((site.weight == 0).float().mean()) == pytest.approx(pattern.sparsity, abs=0.01)
                assert nats == pytest.approx(whole_kl(model, dense, IDS[: tokens // 24]), rel=1e-3)
        return found

    monkeypatch.setattr(trying.Trial, "measured", watched)
    llmprune.prune(model, **OPTIONS)
    assert len(seen) > 1


def whole_kl(model: torch.nn.Module, dense: Mapping[str, torch.Tensor], ids: torch.Tensor) -> float:
    """Of the model as it is from `dense`, which it has afterwards."""
    with torch.no_grad():
        pruned = functional.log_softmax(model(ids).logits[:, :-1].flatten(0, 1), -1)
        model.load_state_dict(dense)
        own = functional.log_softmax(model(ids).logits[:, :-1].flatten(0, 1), -1)
    return float((own.exp() * (own - pruned)).sum(-1).mean())


@pytest.mark.parametrize(("family", "sparsity"), [("llama", "50%"), ("gpt2", "2:4"), ("mixtral", "50%")])
def test_runs_on_disk_as_in_memory(family: str, sparsity: str, saved, tmp_path: Path) -> None:
    model = tiny_model(family, num_hidden_layers=2, **EXPERTS.get(family, {}))
    options = OPTIONS | {"sparsity": sparsity}
    record = llmprune.prune(saved(model), output=tmp_path / "out", dtype="float32", **options).record
    assert verify(tmp_path / "out").problems == ()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    assert not (tmp_path / "out" / "levels").exists()
    said = record.recipe["allocation"]
    assert said["nats"]["found"] <= 1.05 * said["nats"]["uniform"]
    assert said["generation"] >= 2
    assert "found 0." in said["text"]
    if sparsity == "50%":
        assert record.zeros() == sum(round(site.shape[0] * site.shape[1] / 2) for site in record.sites)
    memory = llmprune.prune(model, **options).record
    assert [(site.name, site.pattern) for site in memory.sites] == [(site.name, site.pattern) for site in record.sites]
    assert memory.recipe["allocation"]["nats"] == pytest.approx(said["nats"], rel=1e-5)


class Killed(BaseException):
    """Stands in for a signal."""


class KillAt(Progress):
    def __init__(self, scans: int, generations: int) -> None:
        self.scans, self.generations, self.scanned_blocks, self.told = scans, generations, 0, []

    def scanned(self, matrices: object, pattern: str) -> None:
        self.scanned_blocks += 1
        self.scans -= 1
        if not self.scans:
            raise Killed

    def searched(self, found: Mapping[str, Any], seconds_left: float) -> None:
        self.told.append(found["generation"])
        self.generations -= 1
        if not self.generations:
            raise Killed


def test_a_run_that_was_killed_goes_on(saved, tmp_path: Path) -> None:
    """Within the scan and within the search; a file of the library that is not whole is made again."""
    source, out = saved(tiny_model("llama")), tmp_path / "out"
    whole = KillAt(0, 0)
    llmprune.prune(source, output=tmp_path / "whole", progress=whole, **OPTIONS)
    for killer in (KillAt(2, 0), KillAt(0, 1), KillAt(0, 1)):
        with pytest.raises(Killed):
            llmprune.prune(source, output=out, progress=killer, **OPTIONS)
    assert killer.scanned_blocks == 0
    file = next((tmp_path / ".out.partial" / "levels").glob("model.layers.1.mlp.up_proj-50pct*"))
    file.write_bytes(file.read_bytes()[:-5])
    last = KillAt(0, 0)
    llmprune.prune(source, output=out, progress=last, **OPTIONS)
    assert last.scanned_blocks == 3
    assert last.told == whole.told[2:]
    assert weights(out) == weights(tmp_path / "whole")


def test_a_library_takes_up_what_is_whole(tmp_path: Path) -> None:
    site = next(ModelSource(tiny_model("llama")).blocks()).sites[0]
    library = Library(tmp_path / "levels", Ranks())
    assert not library.has("a", ["50%"])
    weight = site.weight.clone()
    weight[:, ::2] = 0
    library.put("a", parse("50%"), [(site, weight)])
    assert library.has("a", ["50%"])
    assert torch.equal(library.get("a", parse("50%"), [site])[0], weight)
    library.clear()
    assert not (tmp_path / "levels").exists()


def test_a_scan_saves_the_probes(saved, tmp_path: Path) -> None:
    source = saved(tiny_model("llama"))
    llmprune.scan(source, tmp_path / "scan", calibration=IDS, dtype="float32")
    scan = tmp_path / "scan" / "scan.json"
    record = llmprune.prune(source, output=tmp_path / "out", scan=str(scan), dtype="float32", **OPTIONS).record
    assert record.recipe["allocation"]["reckoned_loss_uniform"] > 0
    assert Scan.load(scan).matrices[0].nats > 0


@pytest.mark.parametrize(("options", "words"), [
    ({"allocate": "sensitivity", "search_minutes": 3}, "search_minutes has no effect here: .* with --allocate search"),
    ({"search_minutes": 0}, "search_minutes 0 is impossible: give at least 1"),
    ({"allocate": "serach"}, "unknown allocation 'serach'.*search"),
])  # fmt: skip
def test_bad_input_is_one_line(options: dict, words: str, saved) -> None:
    with pytest.raises(InputError, match=words):
        llmprune.prune(saved(tiny_model("llama")), **(OPTIONS | options))
