"""Options are read one way, and none is accepted where it would do nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmprune.base.errors import InputError
from llmprune.cli.main import main
from llmprune.job.job import Job
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress

WEIGHTS, HEADS, NEURONS, LAYERS = {"sparsity": "2:4"}, {"heads": "25%"}, {"neurons": "25%"}, {"layers": "1"}
BUDGET = {"target_params": "75%"}


def create(**options: object) -> PruneConfig:
    return PruneConfig.create({"model": "m", "output": "auto", **options})


@pytest.mark.parametrize(
    ("roads", "idle"),
    [
        *[(road, {"true_sequential": value}) for road in (HEADS, NEURONS, LAYERS, BUDGET) for value in (True, False)],
        *[(road, {"reconstruct": value}) for road in (HEADS, BUDGET) for value in (True, False)],
        *[(HEADS, idle) for idle in ({"method": "wanda"}, {"quality": "best"}, {"only": ["*"]}, {"skip": ["*"]})],
        *[(road, {"round_to": 8}) for road in (WEIGHTS, HEADS, LAYERS, HEADS | WEIGHTS)],
        *[(road, idle) for road in (WEIGHTS, LAYERS) for idle in ({"score": "magnitude"}, {"per_layer": True})],
        *[(road, {"layer_score": "loss"}) for road in (WEIGHTS, NEURONS, BUDGET)],
        *[(LAYERS, {"refit": value}) for value in (True, False)],
        *[(LAYERS, {"target": value}) for value in ("dense", "corrected")],
        *[(road | {"refit": False}, {"target": "dense"}) for road in (HEADS, NEURONS, BUDGET)],
        *[(WEIGHTS | {"output": None}, idle) for idle in ({"overwrite": True}, {"restart": True})],
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(roads: dict, idle: dict) -> None:
    create(**roads)
    with pytest.raises(InputError, match=f"^{next(iter(idle))} has no effect here: it is there to "):
        create(**roads, **idle)


@pytest.mark.parametrize(
    "options",
    [
        WEIGHTS | {"true_sequential": False, "reconstruct": False, "refit": False, "target": "corrected"},
        HEADS | {"score": "magnitude", "per_layer": True, "refit": True, "target": "corrected"},
        HEADS | WEIGHTS | {"refit": False, "target": "dense"},
        NEURONS | {"round_to": 8, "refit": False},
        BUDGET | {"round_to": 8, "score": "magnitude", "per_layer": True, "target": "dense"},
        LAYERS | WEIGHTS | {"layer_score": "loss", "refit": True, "overwrite": True, "restart": True},
    ],
    ids=str,
)
def test_an_option_with_effect_is_taken(options: dict) -> None:
    config = create(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    ("given", "read"), [(" 2:4 ", "2:4"), ("02:4", "2:4"), ("0.5", "50%"), (0.5, "50%"), ("50 %", "50%"), ("5e-1", "50%")]
)
def test_a_sparsity_has_one_text(given: object, read: str) -> None:
    assert create(sparsity=given).sparsity == read


def test_amounts_have_no_blanks_around_them() -> None:
    config = create(heads=" 25% ", neurons=4, layers="1 ")
    assert (config.heads, config.neurons, config.layers) == ("25%", "4", "1")
    assert create(target_params=" 6b ").target_params == "6b"


@pytest.mark.parametrize("name", ["method", "quality", "score", "target", "calibration", "device", "push_to_hub"])
def test_an_empty_text_is_said_to_be_empty(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} is empty: give it a value"):
        create(**WEIGHTS | {name: " "})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *[("samples", value, "a whole number") for value in (8.0, "8", True, None)],
        *[("refit", value, "true or false") for value in (1, "yes")],
        *[("method", value, "text") for value in (3, b"wanda", ["wanda"])],
        *[("only", value, "a list of text") for value in (1, [1], {"a": 1}, Path("a"), None)],
        *[("heads", value, "a share such as 25% or a count") for value in (True, ["1"])],
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: object, wanted: str) -> None:
    with pytest.raises(InputError) as refused:
        PruneConfig.create({"model": "m", name: value}, where="run.yaml")
    assert str(refused.value) == f"run.yaml: {name} must be {wanted}, not {value!r}"


def test_a_path_is_text_and_a_text_a_list_of_one() -> None:
    config = create(**WEIGHTS | {"output": Path("a") / "b", "only": "*.mlp.*", "skip": ["*.up_proj"]})
    assert (config.output, config.only, config.skip) == (str(Path("a") / "b"), ("*.mlp.*",), ("*.up_proj",))


@pytest.mark.parametrize("name", ["heads", "target_params"])
def test_an_amount_is_a_number_that_can_be(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} '1000+' is impossible"):
        create(**{name: 10**400})


def test_a_record_may_have_options_that_are_unknown_here() -> None:
    assert PruneConfig.recorded({"model": "m", "sparsity": "2:4", "later": 1}) == PruneConfig.create({"model": "m"} | WEIGHTS)


def test_a_file_may_leave_to_flags_what_its_options_are_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: ./no/such\nround_to: 8\nlayer_score: loss\noverwrite: true\n")
    assert main(["--config", str(path), "--neurons", "25%", "--layers", "1"]) == 2
    assert "model folder './no/such' does not exist" in capsys.readouterr().err
    assert main(["--config", str(path), "--heads", "25%", "--layers", "1"]) == 2
    assert "round_to has no effect here" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "length", "device", "processes", "windows"), [
    (None, 512, "cpu", 1, 8), (None, 64, "cpu", 1, 8), (None, 2048, "cpu", 1, 2), (None, 8192, "cpu", 1, 1),
    (None, 8192, "cuda", 1, 8), (None, 512, "cpu", 3, 2), (32, 8192, "cpu", 1, 32), (2, 8, "cuda", 4, 1),
])  # fmt: skip
def test_how_many_windows_run_at_once(asked: int | None, length: int, device: str, processes: int, windows: int) -> None:
    config = PruneConfig.create({"model": "-", "sparsity": "2:4", "batch_size": asked})
    job = Job(config, None, Progress(), SimpleNamespace(size=processes))
    assert job.batch(length, torch.device(device)) == windows
