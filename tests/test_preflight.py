"""What a run is predicted to need, and hidden states that rest on the disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from test_families import EXPERTS
from test_resume import weights

import llmprune
from llmprune.base.errors import InputError, MachineError
from llmprune.cost.base import Sized
from llmprune.cost.footprint import footprint
from llmprune.cost.macs import active
from llmprune.data.windows import Texts, Windows
from llmprune.job.options import PruneConfig
from llmprune.job.recipes import Recipe, choose_recipe
from llmprune.models.discover import find_blocks
from llmprune.runs import preflight
from llmprune.steps.base import Load
from llmprune.steps.channels.permuting import Permuting
from llmprune.steps.channels.rotating import Rotating
from llmprune.stream.activations import Activations
from llmprune.stream.mapped import MappedTensors
from llmprune.stream.source import ModelSource

OPTIONS = {"sparsity": "2:4", "calibration": tokens(6, 24), "batch_size": 4}


def needs(
    family: str = "llama",
    windows: int = 6,
    processes: int = 1,
    pinned: bool = False,
    load: Load | None = None,
    **options: object,
) -> preflight.Needs:
    model = tiny_model(family, **EXPERTS.get(family, {}))
    texts = Texts(Windows(tokens(windows, 24), "t"), Windows(tokens(4, 24), "e"), ())
    recipe = choose_recipe(PruneConfig.create({"model": "-", "sparsity": "2:4"} | options))
    return preflight.estimate(
        model.config,
        list(ModelSource(model).blocks()),
        texts,
        recipe,
        dtype=torch.float32,
        batch=4,
        checkpoint=1000,
        load=load or Load(),
        processes=processes,
        all_experts=bool(options.get("all_experts")),
        pinned=pinned,
    )


@pytest.mark.parametrize(("options", "streams"), [({"method": "wanda"}, 1), ({"quality": "balanced"}, 2)])
def test_activations_are_counted_exactly(options: dict, streams: int) -> None:
    model = tiny_model("llama")
    blocks = list(find_blocks(model).values())
    each = [
        Activations.record(model, blocks, Windows(tokens(count, 24), "t"), batch=4, device=torch.device("cpu"))
        for count in [6] * streams + [4, 4]
    ]
    kept = streams * 6 * 24 * 48 * 4  # in the middle of a block, stage by stage: at most what down is fed
    assert needs(**options).activations == sum(hidden.nbytes for one in each for hidden in one.hidden) + kept


def test_more_work_needs_more() -> None:
    wanda, balanced, best = (needs(**o) for o in ({"method": "wanda"}, {"quality": "balanced"}, {"quality": "best"}))
    assert wanda.solve == 0 < balanced.solve == best.solve
    assert wanda.solving < balanced.solving
    assert wanda.forward < balanced.forward < best.forward
    assert wanda.weights < balanced.weights < best.weights
    two = needs(quality="balanced", processes=2)
    assert two.activations * 2 == balanced.activations
    assert balanced.solve / 2 < two.solve < balanced.solve
    assert needs("mixtral", quality="balanced").solving > balanced.solving
    assert needs(windows=12).forward > 1.5 * needs().forward


def test_operations_of_a_plain_run() -> None:
    """By hand: 3 blocks; each of q, o is 32x32, k, v 16x32, gate, up 48x32, down 32x48; two passes over 144 tokens."""
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    evaluated = 4 * 24
    head = 2 * 2 * evaluated * 32 * 96
    assert needs(method="wanda").forward == 2 * 3 * block * (2 * 144 + 2 * evaluated) + head
    gram = 2 * 6 * 32**2 + 2 * 48**2  # six matrices are fed 32 inputs, one 48
    sweeps = 2 * (2 * 32 + 2 * 16 + 2 * 48) * 32**2 + 2 * 32 * 48**2
    inverses = 2 * 6 * (6 * 32**3 + 48**3)
    assert needs(method="sparsegpt").statistics == 3 * 144 * gram
    assert needs(method="sparsegpt", target="corrected").statistics == 2 * 3 * 144 * gram
    assert needs(method="sparsegpt").solve == 3 * (sweeps + inverses)
    assert needs(method="wanda").statistics == 0


def test_what_looking_for_channels_gathers() -> None:
    """By hand: 3 blocks; q, k, v read one input, gate and up another; o and down write. Wide matrices by 1024 of their rows."""
    blocks = list(ModelSource(tiny_model("llama")).blocks())
    inputs, rows, columns = 2 * 32 * 32, (32 + 16 + 16 + 48 + 48) * 32, (32 + 48) * 32
    assert Permuting.load(blocks, 32).gathered == 3 * 4 * (inputs + rows)
    rotating = Rotating.load(blocks, 32)
    assert rotating.gathered == 3 * 4 * (inputs + rows + columns)
    one_way = 2 * 32**2 * (6 * 32 + (6 + 6) * 1024)  # R^T H^-1 R of six inputs, R W of six readers and six writers
    choosing = 5000 * 32 * (6 + 6) * 1024
    assert rotating.operations == 100 * (2 * one_way + 8 * 32**3 + choosing)
    wide = list(ModelSource(tiny_model("llama", intermediate_size=1500)).blocks())
    more = 3 * 4 * 32 * (2 * (1024 - 48) + 1024 - 48)
    assert Rotating.load(wide, 32).gathered == rotating.gathered + more


def test_a_step_that_only_looks_does_not_evaluate() -> None:
    own = Recipe("own", "sparsegpt")  # in place of the job's
    looks = needs(load=Load(own, evaluates=False, gathered=1000, operations=10.0), method="wanda")
    prunes = needs(method="sparsegpt")
    assert looks.solving == prunes.solving + 1000
    assert looks.solve == prunes.solve + 10
    assert looks.forward < prunes.forward


def test_pinned_memory_is_rounded_up_to_a_power_of_two() -> None:
    """Tensors of 4 windows of 24 tokens: 48 wide in the middle of a block, 32 between two; 6 windows in two streams, and 4 to
    evaluate, dense and pruned."""
    middle, between = 2**15 / (4 * 24), 2**14 / (4 * 24)
    assert (4 * 24 * 48 * 4, 4 * 24 * 32 * 4) < (2**15, 2**14)
    pinned = needs(quality="balanced", pinned=True).activations
    assert pinned == int(2 * 144 * middle + (2 * 144 + 2 * 96) * between)
    assert pinned > needs(quality="balanced").activations


def test_seconds_follow_what_products_were_measured_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics at the compute dtype's speed, solving at float32's."""
    speeds = {torch.bfloat16: 500.0, torch.float32: 50.0}
    monkeypatch.setattr(preflight, "operations_per_second", lambda device, dtype: speeds[dtype])
    work = preflight.Needs(0, 0, 0, 0, 0, forward=1000.0, statistics=2000.0, solve=300.0)
    assert work.seconds(torch.device("cuda"), torch.bfloat16) == pytest.approx((2 + 4 + 6) / preflight._EFFICIENCY)
    assert work.seconds(torch.device("cuda"), torch.float32) == pytest.approx((20 + 40 + 6) / preflight._EFFICIENCY)


@pytest.mark.parametrize("chosen", [1, 3])
def test_multiplications_count_the_experts_that_a_token_is_sent_to(chosen: int) -> None:
    """By hand: q, o 32x32; k, v 16x32; of each chosen expert gate, up 48x32 and down 32x48; the router 4x32."""
    model = tiny_model("mixtral", **EXPERTS["mixtral"] | {"num_experts_per_tok": chosen})
    blocks = list(ModelSource(model).blocks())
    block = 2 * 32 * 32 + 2 * 16 * 32 + chosen * 3 * 48 * 32
    assert active(model.config, blocks) == 3 * block
    assert (
        footprint(Sized(model, blocks, 0, {name: own.dtype for name, own in model.named_parameters()}))["macs_a_token"]
        == 3 * (block + 4 * 32) + 32 * 96
    )


def test_all_experts_take_every_token() -> None:
    assert needs("mixtral", windows=6).forward < needs("mixtral", windows=6, all_experts=True).forward


def test_the_record_holds_what_was_predicted(saved, tmp_path: Path) -> None:
    record = llmprune.prune(saved(tiny_model("llama")), output=tmp_path / "out", method="wanda", **OPTIONS).record
    assert record.predicted["seconds"] > 0
    assert record.predicted["text"].startswith("about ")


_RUNS = """
import json, os, sys
import torch
import llmprune
llmprune.prune  # imports it, for all
torch.set_num_threads(1)
for line in sys.stdin:
    source, output, options = json.loads(line)
    if not os.fork():
        windows = torch.randint(3, 16000, (options.pop("windows"), 128), generator=torch.Generator().manual_seed(0))
        options |= {"sparsity": "2:4", "calibration": windows, "batch_size": 32, "dtype": "float32"}
        record = llmprune.prune(source, output=output, **options).record
        print(json.dumps([record.predicted, record.peak_memory["process"]]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_memory_is_predicted_within_half(saved, tmp_path: Path) -> None:
    """Three runs, each in a process of its own: what is taken beyond what the process held, and in all."""
    sizes = {"vocab_size": 16000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "head_dim": 64}
    source = saved(tiny_model("llama", max_position_embeddings=128, **sizes).to(torch.bfloat16))
    # batches so large that each tensor of theirs is mapped by itself: what the heap keeps of smaller ones varies by chance
    runs = [{"method": "wanda", "windows": 256}, {"quality": "balanced", "windows": 96}, {"quality": "best", "windows": 64}]
    asked = "\n".join(json.dumps([str(source), str(tmp_path / f"{number}"), own]) for number, own in enumerate(runs))
    done = subprocess.run([sys.executable, "-c", _RUNS], input=asked, capture_output=True, text=True, check=True)
    for line, options in zip(done.stdout.splitlines(), runs, strict=True):
        predicted, peak = json.loads(line)
        inside = sum(predicted[part] for part in ("activations", "weights", "solving"))
        assert 1 / 1.5 < inside / (peak - predicted["start"]) < 1.5, options
        assert 1 / 1.2 < (inside + predicted["start"]) / peak < 1.2, options


def test_too_little_disk_is_an_error_before_any_work(saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60_000))
    source = saved(tiny_model("llama"))
    with pytest.raises(MachineError, match=r"output .*out needs \d+ KiB of disk, where 59 KiB are free: make room"):
        llmprune.prune(source, output=tmp_path / "out", method="wanda", **OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(("free", "mapped", "words"), [
    (10**12, False, None),
    (100, False, "--activations disk"),
    (100, True, "memory free here: fewer --samples"),
])  # fmt: skip
def test_too_little_memory_is_told(free: int, mapped: bool, words: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = preflight.psutil.virtual_memory()
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: real._replace(available=free))
    told = preflight.shortage(needs(), torch.device("cpu"), mapped=mapped)
    assert told is None if words is None else told is not None and words in told


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    real, each = preflight.psutil.virtual_memory(), needs()
    wanted = each.activations + each.weights + each.solving
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: real._replace(available=2 * wanted))
    assert preflight.shortage(each, torch.device("cpu"), mapped=False, here=2) is None
    assert preflight.shortage(each, torch.device("cpu"), mapped=False, here=3) is not None


def test_mapped_tensors_are_a_list(tmp_path: Path) -> None:
    expected = [torch.randn(2, 3), torch.randn(7).bfloat16(), torch.randn(1, 5, 4), torch.randn(3, 4).T]
    held = MappedTensors(tmp_path, expected)
    copy = held.copy()
    held[1] = torch.ones(7, dtype=torch.bfloat16)
    assert [torch.equal(a, b) for a, b in zip(held, expected, strict=True)] == [True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(copy, expected, strict=True))
    assert held[1].sum() == 7
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="--activations memory"):
        held[0] = torch.zeros(3, 2)
    with pytest.raises(InputError, match=r"turns torch.float32 \[2, 3\] into torch.float64 \[2, 3\]"):
        held[0] = torch.zeros(2, 3, dtype=torch.float64)
    for change in (lambda: held.insert(0, expected[0]), lambda: held.pop()):
        with pytest.raises(TypeError, match="stay where they are"):
            change()


def test_what_is_changed_in_a_mapped_tensor_is_changed_in_the_list(tmp_path: Path) -> None:
    """And what is set in the list is seen in a tensor that was taken out before, which outlives the list."""
    held = MappedTensors(tmp_path, [torch.zeros(5), torch.zeros(5000)])
    held[1].add_(2)
    assert held[1].sum() == 10_000
    taken = held[0]
    held[0] = torch.full((5,), 3.0)
    held.append(torch.ones(9))
    del held
    assert taken.tolist() == [3.0] * 5


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts Linux's own descriptors")
def test_mapped_tensors_take_few_file_descriptors(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = MappedTensors(tmp_path, (torch.full((i % 7 + 1, 5), float(i)) for i in range(500)))
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 40
    assert all(bool((one == i).all()) for i, one in enumerate(held))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_mapped_tensors_take_no_memory(tmp_path: Path) -> None:
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith(("RssFile", "RssShmem")))

    before, each = resident(), 2**22
    held = MappedTensors(tmp_path, (torch.full((each // 4,), float(i)) for i in range(16)))
    assert [float(one.sum()) for one in held] == [float(i * each // 4) for i in range(16)]
    assert resident() - before < 3 * each // 1024


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_same_result_with_activations_on_disk(family: str, saved, tmp_path: Path) -> None:
    source = saved(tiny_model(family, **EXPERTS.get(family, {})))
    for place in ("memory", "disk"):
        llmprune.prune(source, output=tmp_path / place, quality="best", activations=place, **OPTIONS)
    assert weights(tmp_path / "memory") == weights(tmp_path / "disk")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "memory", "disk"}


def test_a_disk_that_is_full_later_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that write elsewhere what replaces something."""
    held = MappedTensors(tmp_path, [torch.zeros(100)])

    def refuse(file: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(MachineError, match="no room for the activations in"):
        held[0] = torch.ones(100)


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write takes a part only, the second nothing."""
    real = os.pwrite
    answers = iter([lambda file, data, at: real(file, data[:100], at)])

    def write(file: int, data: memoryview, at: int) -> int:
        for answer in answers:
            return answer(file, data, at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(MachineError, match=f"no room for the activations in {tmp_path}: No space left"):
        MappedTensors(tmp_path, [torch.zeros(100)])


def test_no_room_for_activations_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(InputError, match="no room for the activations in"):
            MappedTensors(tmp_path, [torch.zeros(10_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
