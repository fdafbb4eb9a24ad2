"""Budgets that pruned weights meet: counted again from the files that come of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from safetensors.torch import load_file
from test_families import EXPERTS
from test_resume import weights

import llmprune
from llmprune.base.errors import InputError
from llmprune.formats.matrices import packed_bytes
from llmprune.job.progress import Progress
from llmprune.output.verify import verify
from llmprune.steps.weights.allocate.sensitivity import choose

OPTIONS = {"calibration": tokens(6, 24), "batch_size": 2, "method": "sparsegpt", "by": "weights"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: own for file in folder.glob("*.safetensors") for name, own in load_file(file).items()}


def test_several_limits_are_kept_at_least_cost() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        costs, first, second = (torch.rand(4, 3, generator=generator).tolist() for _ in range(3))

        def total(each: list[list[float]], picked: tuple[int, ...]) -> float:
            return sum(own[k] for own, k in zip(each, picked, strict=True))

        able = [
            picked
            for picked in itertools.product(range(3), repeat=4)
            if total(first, picked) <= 2.0 and total(second, picked) <= 2.2
        ]
        if able:
            best = min(able, key=lambda picked: total(costs, picked))
            assert tuple(choose(costs, (first, 2.0), (second, 2.2))) == best


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_parameters_and_multiplications(family: str, saved, tmp_path: Path) -> None:
    """Nonzero weights of the files; of experts, with the share of the tokens that meet them."""
    model = tiny_model(family, **EXPERTS.get(family, {}))
    source, out = saved(model), tmp_path / "out"
    record = llmprune.prune(source, output=out, target_params="70%", target_macs="65%", **OPTIONS).record
    assert verify(out).problems == ()
    saved_after = tensors(out)
    nonzero = sum(int((own != 0).sum()) for own in saved_after.values())
    zeros = record.zeros()
    total = model.num_parameters()
    budgets = {title: (whole, left) for title, whole, left in record.recipe["allocation"]["budgets"]}
    assert budgets["nonzero parameters"] == (total, total - zeros)
    assert total - zeros == nonzero  # a random model has no other zeros
    assert nonzero <= 0.7 * total
    whole, left = budgets["multiplications a token, of nonzero weights"]
    share = {"experts": 0.5}  # of four experts a token meets two
    saved_macs = sum(
        round(site.sparsity * site.shape[0] * site.shape[1]) * share.get("experts" if ".experts." in site.name else "", 1)
        for site in record.sites
    )
    assert whole - left == pytest.approx(saved_macs, abs=1)
    assert left <= 0.65 * whole
    assert left > 0.63 * whole  # and no more goes than has to
    assert len({site.pattern for site in record.sites}) > 3
    page = llmprune.report(out, tmp_path / "page.html")["runs"][0]
    shown = {row[0]["value"]: (row[1]["value"], row[2]["value"]) for row in page["sizes"]["rows"]}
    assert shown.items() >= budgets.items()
    assert page["spread"] == record.recipe["allocation"]["text"]


def test_bytes_are_those_of_the_packed_files(saved, tmp_path: Path) -> None:
    source, out = saved(tiny_model("llama").bfloat16()), tmp_path / "out"
    record = llmprune.prune(source, output=out, target_bytes="85%", **OPTIONS).record
    llmprune.pack(out, tmp_path / "packed")
    stored = sum(own.numel() * own.element_size() for own in tensors(tmp_path / "packed").values())
    ((title, whole, left),) = record.recipe["allocation"]["budgets"]
    assert (title, left) == ("weight bytes when packed", stored)
    assert whole == sum(own.numel() * own.element_size() for own in tensors(source).values())
    largest = max(2 * own.shape[0] * own.shape[1] - packed_bytes(*own.shape, 2) for own in record.sites)
    assert 0.85 * whole - largest < left <= 0.85 * whole
    assert {site.pattern for site in record.sites} == {"2:4"}
    assert set(record.skipped.values()) == {"dense in the allocation"}


class Killed(BaseException):
    """Stands in for a signal."""


class Kill(Progress):
    def site(self, site: object) -> None:
        raise Killed


def test_it_goes_on_and_a_scan_made_before_serves(saved, tmp_path: Path) -> None:
    source, options = saved(tiny_model("llama")), OPTIONS | {"target_params": "60%"}
    llmprune.prune(source, output=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        llmprune.prune(source, output=tmp_path / "out", progress=Kill(), **options)
    llmprune.prune(source, output=tmp_path / "out", **options)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    llmprune.scan(source, tmp_path / "scan", calibration=options["calibration"])
    record = llmprune.prune(source, output=tmp_path / "by", scan=str(tmp_path / "scan" / "scan.json"), **options).record
    assert record.recipe["allocation"]["budgets"][0][2] <= 0.6 * record.model["parameters"]
    assert "probe" not in record.seconds


@pytest.mark.parametrize(("options", "words"), [
    ({"target_params": "10%"}, "target_params 10% is .* but 90% in every matrix leaves .*: ask for more"),
    ({"target_bytes": "99%"}, "target_bytes 99% is .*, but 2:4 in all matrices that can be packed leaves"),  # it is float32
    ({"target_macs": "100%"}, "leaves all of the"),
    ({"target_speedup": "1.5x"}, "target_speedup is met by structure only"),
    ({"target_params": "75%", "sparsity": "50%"}, "sparsity and a budget by weights exclude each other"),
    ({"target_params": "75%", "heads": "25%"}, "target_params and heads cannot be combined"),
    ({"target_params": "75%", "allocate": "owl"}, "allocate has no effect here"),
    ({"target_params": "75%", "round_to": 8}, "round_to has no effect here"),
    ({"target_params": "75%", "by": "weight"}, "unknown by 'weight'"),
    ({"sparsity": "50%"}, "by has no effect here"),
])  # fmt: skip
def test_a_bad_budget_is_one_line(options: dict, words: str, saved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        llmprune.prune(saved(tiny_model("llama")), output=tmp_path / "out", **(OPTIONS | options))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_model_in_memory_keeps_no_budget() -> None:
    with pytest.raises(InputError, match="budgets kept and weights rounded from folder to folder"):
        llmprune.prune(tiny_model("llama"), target_params="75%", **OPTIONS)
