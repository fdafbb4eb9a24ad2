"""How a sparsity is spread over matrices: scans against brute force, exact budgets, and runs that go by them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from test_families import EXPERTS
from test_resume import weights
from torch.nn import functional

import llmprune
from llmprune.base.errors import InputError
from llmprune.job.progress import Progress
from llmprune.job.scan import Scan, Scanned, loss
from llmprune.numerics.patterns import NM, Unstructured, parse
from llmprune.numerics.stats import Gram
from llmprune.output.verify import verify
from llmprune.solvers import METHODS
from llmprune.steps.weights.allocate import ALLOCATORS
from llmprune.steps.weights.allocate.base import exact, levels, share
from llmprune.steps.weights.allocate.sensitivity import choose

IDS = tokens(6, 24)
OPTIONS = {"calibration": IDS, "batch_size": 2, "dtype": "float32"}
SPREAD = {"sparsity": "50%", "allocate": "sensitivity", "method": "sparsegpt"}


def scanned(
    name: str, *, block: int = 0, nats: float = 0.1, steep: float = 1.0, outliers: float = 0.1, sites: int = 1
) -> Scanned:
    errors = {str(Unstructured(s)): steep * s**4 for s in (0.3, 0.5, 0.7, 0.9)}
    errors |= {"6:8": steep * 0.01, "2:4": steep * 0.1, "1:4": steep * 0.5}
    return Scanned(name, block, name.rpartition(".")[2], sites, 16, 32, errors, nats, outliers)


def a_scan(*matrices: Scanned) -> Scan:
    return Scan({}, {}, {}, "sparsegpt", "70%", 64, list(matrices), {})


SCAN = a_scan(
    scanned("0.q", nats=0.02), scanned("0.v", nats=0.4, outliers=0.3), scanned("1.q", block=1, nats=0.1, outliers=0.05),
    scanned("1.e.*.v", block=1, nats=0.5, sites=3, outliers=0.2),
)  # fmt: skip


def test_a_curve_is_measured_or_log_linear() -> None:
    one = scanned("q")
    assert one.error(Unstructured(0.5)) == 0.5**4
    between = one.error(Unstructured(0.6))
    assert between == pytest.approx((0.5**4 * 0.7**4) ** 0.5)
    assert one.error(Unstructured(0.95)) > 0.9**4
    with pytest.raises(InputError, match="has not measured q at 4:8"):
        one.error(NM(4, 8))


def test_choices_are_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.rand(4, 3, generator=generator).tolist()
        sizes = torch.rand(4, 3, generator=generator).tolist()
        most = 2.0
        possible = [
            (sum(costs[i][k] for i, k in enumerate(picked)), picked)
            for picked in itertools.product(range(3), repeat=4)
            if sum(sizes[i][k] for i, k in enumerate(picked)) <= most
        ]
        assert tuple(choose(costs, (sizes, most))) == min(possible)[1]
    with pytest.raises(InputError, match="no choice of patterns is small enough"):
        choose([[1.0], [1.0]], ([[3.0], [3.0]], 1.0))


@pytest.mark.parametrize("name", [name for name in ALLOCATORS.names() if not getattr(ALLOCATORS.get(name), "measures", False)])
@pytest.mark.parametrize("text", ["50%", "61.3%", "90%"])
def test_exactly_as_many_weights_go(name: str, text: str) -> None:
    found = ALLOCATORS.get(name).allocate(SCAN, parse(text))
    assert found.keys() == {one.name for one in SCAN.matrices}
    drops = sum(one.sites * round(found[one.name].sparsity * 512) for one in SCAN.matrices)
    uniform = sum(one.sites * round(parse(text).sparsity * 512) for one in SCAN.matrices)
    assert drops == uniform


def test_what_costs_more_is_pruned_less() -> None:
    found = {name: own.sparsity for name, own in ALLOCATORS.get("sensitivity").allocate(SCAN, Unstructured(0.5)).items()}
    assert found["0.v"] < found["1.q"] < found["0.q"]
    best = sum(loss(one, "70%", Unstructured(found[one.name])) for one in SCAN.matrices)
    assert best < 0.95 * sum(loss(one, "70%", Unstructured(0.5)) for one in SCAN.matrices)
    owl = {name: own.sparsity for name, own in ALLOCATORS.get("owl").allocate(SCAN, Unstructured(0.5)).items()}
    assert owl["0.q"] == pytest.approx(owl["0.v"], abs=0.005)  # one of them has what rounding left over
    assert owl["1.q"] - owl["0.q"] == pytest.approx(0.16, abs=0.01)  # eight points either side, fewer outliers go further


def test_mixed_patterns_take_no_more_bytes() -> None:
    found = ALLOCATORS.get("sensitivity").allocate(SCAN, NM(2, 4))
    assert levels(SCAN.matrices[0], NM(2, 4)) == [None, NM(6, 8), NM(2, 4), NM(1, 4)]
    assert share(NM(2, 4)) == 0.5625  # what a packed layer takes of a dense one
    assert sum(one.weights * share(found[one.name]) for one in SCAN.matrices) <= 0.5625 * sum(o.weights for o in SCAN.matrices)
    assert share(found["0.v"]) > share(found["0.q"])
    best = sum(loss(one, "70%", found[one.name]) for one in SCAN.matrices)
    assert best < sum(loss(one, "70%", NM(2, 4)) for one in SCAN.matrices)
    with pytest.raises(InputError, match=r"owl gives each block a sparsity of its own, and 2:4 has but one"):
        ALLOCATORS.get("owl").allocate(SCAN, NM(2, 4))


def test_rounding_is_made_up_for() -> None:
    one, many = scanned("q"), scanned("e.*.v", sites=3)
    found = exact([one, many], {"q": 0.5014, "e.*.v": 0.4986}, Unstructured(0.5))
    assert round(found["q"].sparsity * 512) + 3 * round(found["e.*.v"].sparsity * 512) == 4 * 256
    with pytest.raises(InputError, match="cannot be spread over these matrices"):
        exact([one, many], {"q": 0.9995, "e.*.v": 0.9995}, Unstructured(0.9995))


def test_a_scan_is_what_a_whole_model_shows(saved, tmp_path: Path) -> None:
    """Errors by the inputs of the whole dense model, and KL of the whole model with one matrix pruned."""
    model = tiny_model("llama")
    found = llmprune.scan(saved(model), tmp_path / "scan", calibration=IDS, dtype="float32")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    site = "model.layers.1.mlp.down_proj"
    layer, inputs = model.get_submodule(site), []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        dense = functional.log_softmax(model(IDS).logits[:, :-1].flatten(0, 1), -1)
        handle.remove()
        gram = Gram(layer.in_features, torch.device("cpu"))
        gram.add(torch.cat(inputs))
        w, x = layer.weight.clone(), torch.cat(inputs)
        one = next(one for one in found.matrices if one.name == site)
        for pattern in ("30%", "50%", "90%", "2:4", "70%"):
            pruned = METHODS.get("sparsegpt").solve(w, gram, parse(pattern)).weight
            error = (x @ (w - pruned).T).square().sum() / (x @ w.T).square().sum()
            assert one.errors[pattern] == pytest.approx(float(error), rel=1e-3)
        layer.weight.copy_(pruned)
        logits = functional.log_softmax(model(IDS).logits[:, :-1].flatten(0, 1), -1)
    nats = float((dense.exp() * (dense - logits)).sum(-1).mean())
    assert one.nats == pytest.approx(nats, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", ["wanda", "balanced"])
def test_runs_go_by_it_on_disk_as_in_memory(family: str, method: str, saved, tmp_path: Path) -> None:
    model = tiny_model(family, **EXPERTS.get(family, {}))
    source, how = saved(model), {"quality" if method == "balanced" else "method": method}
    options = OPTIONS | SPREAD | {"method": None} | how
    dense = {name: own.clone() for name, own in model.state_dict().items()}
    record = llmprune.prune(source, output=tmp_path / "out", **options).record
    assert verify(tmp_path / "out").problems == ()
    assert len({site.pattern for site in record.sites}) > 3
    uniform = sum(round(site.shape[0] * site.shape[1] / 2) for site in record.sites)
    assert record.zeros() == uniform
    said = record.recipe["allocation"]
    assert said["reckoned_loss"] < said["reckoned_loss_uniform"]
    options.pop("dtype")
    memory = llmprune.prune(model, **options).record
    assert [(site.name, site.pattern) for site in memory.sites] == [(site.name, site.pattern) for site in record.sites]
    changed = {name for name, own in model.state_dict().items() if not torch.equal(own, dense[name])}
    assert changed  # and nothing but the sites that were pruned: a probe puts all back
    assert {name for name in changed if "norm" in name or "embed" in name or "wte" in name} == set()


class Killed(BaseException):
    """Stands in for a signal."""


class KillAt(Progress):
    def __init__(self, scans: int, sites: int) -> None:
        self.scans, self.sites, self.notes, self.scanned_blocks = scans, sites, [], 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def scanned(self, matrices: object, pattern: str) -> None:
        self.scanned_blocks += 1
        self.scans -= 1
        if not self.scans:
            raise Killed

    def site(self, site: object) -> None:
        self.sites -= 1
        if not self.sites:
            raise Killed


def test_a_run_that_was_killed_goes_on(saved, tmp_path: Path) -> None:
    """Within the scan, and after it: to the same files."""
    source = saved(tiny_model("llama"))
    llmprune.prune(source, output=tmp_path / "whole", **OPTIONS, **SPREAD)
    for killer in (KillAt(3, 0), KillAt(0, 12)):
        with pytest.raises(Killed):
            llmprune.prune(source, output=tmp_path / "out", progress=killer, **OPTIONS, **SPREAD)
    last = KillAt(0, 0)
    llmprune.prune(source, output=tmp_path / "out", progress=last, **OPTIONS, **SPREAD)
    assert last.scanned_blocks == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_scan_or_a_file_says_how(saved, tmp_path: Path) -> None:
    """The scan's own files, edited or not; a scan made once serves many runs."""
    source, out = saved(tiny_model("llama")), tmp_path / "scan"
    llmprune.scan(source, out, calibration=IDS)
    assert {path.name for path in out.iterdir()} >= {"scan.json", "allocation-50pct.json", "allocation-2of4.json"}
    by_scan = llmprune.prune(source, output=tmp_path / "a", **OPTIONS, **SPREAD, scan=str(out / "scan.json")).record
    file = str(out / "allocation-50pct.json")
    by_file = llmprune.prune(source, output=tmp_path / "b", **OPTIONS, allocation=file, method="sparsegpt").record
    assert [(site.name, site.pattern) for site in by_scan.sites] == [(site.name, site.pattern) for site in by_file.sites]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"model.layers.0.mlp.down_proj": "dense", "*.down_proj": "2:4", "*.q_proj": "30%"}))
    record = llmprune.prune(source, output=tmp_path / "c", **OPTIONS, allocation=str(mine), method="wanda").record
    assert {site.name.rpartition(".")[2]: site.pattern for site in record.sites} == {"down_proj": "2:4", "q_proj": "30%"}
    assert record.skipped["model.layers.0.mlp.down_proj"] == "dense in the allocation"
    assert record.skipped["model.layers.0.mlp.up_proj"] == "not in --allocation"


@pytest.mark.parametrize(("content", "words"), [
    ("[]", "is not a JSON object"),
    ("{}", "is no allocation"),
    ('{"*.q_proj": 3}', r"\*\.q_proj is 3: give a text such as 45%, 2:4 or dense"),
    ('{"*.q_proj": "150%"}', r"\*\.q_proj: sparsity 1.5 is impossible"),
    ('{"*.nothing": "50%"}', "nothing matches no matrix; they are named like model.layers.0"),
    ('{"*.q_proj": "1:7"}', "q_proj cannot be 1:7: its width of 32 columns is not a multiple of 7"),
    ('{"*": "dense"}', "leaves nothing to prune"),
])  # fmt: skip
def test_a_bad_allocation_is_one_line(content: str, words: str, saved, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=words):
        llmprune.prune(
            saved(tiny_model("llama")), output=tmp_path / "out", **OPTIONS, allocation=str(tmp_path / "a.json"), method="wanda"
        )
    assert {path.name for path in tmp_path.iterdir()} == {"source", "a.json"}


@pytest.mark.parametrize(("options", "words"), [
    ({"sparsity": "50%", "allocation": "a.json"}, "sparsity and allocation exclude each other"),
    ({"sparsity": "50%", "allocate": "fair"}, "unknown allocation 'fair'"),
    ({"sparsity": "50%", "scan": "scan.json"}, "scan has no effect here"),
    ({"neurons": "25%", "allocate": "owl", "output": "out"}, "allocate has no effect here"),
    ({"sparsity": "50%", "allocate": "owl", "scan": "absent.json"}, "cannot read absent.json"),
])  # fmt: skip
def test_bad_input_is_one_line(options: dict, words: str, saved) -> None:
    with pytest.raises(InputError, match=words):
        llmprune.prune(saved(tiny_model("llama")), **OPTIONS, **options)


def test_a_scan_of_another_model_is_refused(saved, tmp_path: Path) -> None:
    llmprune.scan(saved(tiny_model("llama")), tmp_path / "scan", calibration=IDS)
    for changes, words in (
        ({"intermediate_size": 64}, "of another model"),
        ({"num_hidden_layers": 4}, "the scan lacks 7 matrices"),
    ):
        other = saved(tiny_model("llama", **changes), name=f"other{len(changes)}{words[:3].strip()}")
        with pytest.raises(InputError, match=words):
            llmprune.prune(other, output=tmp_path / "out", **OPTIONS, **SPREAD, scan=str(tmp_path / "scan" / "scan.json"))
