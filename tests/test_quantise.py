"""Quantising: every family, zeros kept, the same logits in plain transformers, going on after a stop, processes, bad input."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from safetensors.torch import load_file, save_file
from test_families import ALL, kind
from test_ranks import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmprune
from llmprune.base.errors import InputError
from llmprune.cli.main import main
from llmprune.formats.packed import open_checkpoint
from llmprune.formats.quantised import CodesView, quantisation_config
from llmprune.job.progress import Progress
from llmprune.job.record import CodeRecord
from llmprune.models.resolve import BUNDLED
from llmprune.numerics.codes import unpack
from llmprune.output.verify import verify
from llmprune.steps.quantise.plan import default_group

SOME = {"method": "magnitude", "batch_size": 2}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What is on disk, codes as the weights that they stand for."""
    checkpoint = open_checkpoint(folder)
    return {name: tensor.clone() for name, tensor in checkpoint.read(list(checkpoint.tensors))}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"The {number} th word of it, {number * number}." for number in range(250)))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama with the bundled tokenizer, in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    for saved in (tiny_model("llama", vocab_size=len(tokenizer)).bfloat16(), tokenizer):
        saved.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def some(text: str) -> dict:
    return {"calibration": text, "samples": 4, "seqlen": 16, "eval_text": text, "batch_size": 2}


@pytest.fixture(params=list(ALL))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, **ALL[request.param])


def test_every_family(model: PreTrainedModel, tmp_path: Path, read_elsewhere, request: pytest.FixtureRequest) -> None:
    """Pruned, then quantised: what was zero is zero, matrices are on their grids, the rest is bit-identical, and plain
    transformers put out what the weights that the codes stand for put out."""
    source, out = tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source, max_shard_size="20KB")
    llmprune.prune(source, output=tmp_path / "pruned", sparsity="50%", calibration=tokens(4, 16), **SOME)
    asked = {"sparsity": "50%", "bits": 4, "calibration": tokens(4, 16), **SOME}
    family = request.node.callspec.params["model"]
    if family == "llama4_text":
        with pytest.raises(InputError, match="Llama4TextExperts cannot be in a quantised model"):
            llmprune.prune(source, output=out, **asked)
        return
    record = llmprune.prune(source, output=out, **asked).record
    before, after, stored = weights(tmp_path / "pruned"), weights(out), open_checkpoint(out)
    assert before.keys() == after.keys()
    assert {one.name for one in record.codes} == {site.name for site in record.sites}
    places: dict[str, list[CodeRecord]] = {}
    for one in record.codes:
        places.setdefault(one.tensor, []).append(one)
    for name, was in before.items():
        assert bool((after[name][was == 0] == 0).all()), name
        assert torch.equal(was, after[name]) != (name in places), name
    coded = [one for one in record.codes if one.coded]
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    whole = {one.name for one in record.codes if not one.part and not one.transposed}
    able = (whole & linear) | {name for name in whole if ".experts." in name}
    assert {one.name for one in coded} == able
    for one in coded:
        assert isinstance(stored, CodesView)
        w = after[one.tensor].unflatten(1, (-1, one.group))
        distinct = max(len(set(group.abs().tolist())) for row in w for group in row)
        assert distinct <= 9, one.name  # codes from 0 to 8
        assert one.error is None or one.error < 0.5
    assert verify(out).problems == ()
    found = read_elsewhere(out)
    assert found["amiss"] == {}
    if kind(family) != "partly":
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
        mine = llmprune.load(out, dense=True)
        with torch.no_grad():
            logits = mine(torch.tensor([[5, 6, 7, 8]])).logits[0]
            other = twin(torch.tensor([[5, 6, 7, 8]])).logits[0]
        assert torch.allclose(torch.tensor(found["logits"]), logits, atol=1e-5)
        assert float((logits - other).abs().max()) > 1e-4  # it is another model


def test_what_the_codes_are(source: Path, some: dict, tmp_path: Path) -> None:
    """Round to nearest, read from the file by hand, is the plain formula with the scales that are there."""
    out = tmp_path / "out"
    llmprune.quantise(source, out, bits=3, group_size=16, rounding="nearest", **some)
    dense = {name: own for file in source.glob("*.safetensors") for name, own in load_file(file).items()}
    stored = {name: own for file in out.glob("*.safetensors") for name, own in load_file(file).items()}
    name = "model.layers.1.mlp.up_proj.weight"
    assert name not in stored
    codes = unpack(stored[f"{name}_packed"], 3, 32)
    scales = stored[f"{name}_scale"]
    assert stored[f"{name}_shape"].tolist() == [48, 32]
    assert scales.dtype == torch.bfloat16
    groups = dense[name].float().view(48, 2, 16)
    assert torch.equal(scales, (groups.abs().amax(-1) / 3).bfloat16())
    nearest = (groups / scales.float()[..., None]).round().clamp(-4, 3).view(48, 32)
    assert torch.equal(codes.float(), nearest)
    for other in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(stored[other], dense[other])


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_folder_that_was_pruned(bits: int, source: Path, some: dict, tmp_path: Path, read_elsewhere) -> None:
    """The same as one command, the record goes on, and each of its readers knows of the codes."""
    asked = {"sparsity": "2:4", "method": "sparsegpt", **some}
    pruned = llmprune.prune(source, output=tmp_path / "pruned", **asked).record
    at_once = llmprune.prune(source, output=tmp_path / "one", bits=bits, **asked).record
    later = llmprune.quantise(tmp_path / "pruned", tmp_path / "two", bits=bits, samples=4, seqlen=16, batch_size=2).record
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert later.rounding["arguments"]["calibration"] == some["calibration"]
    assert at_once.dense == later.dense == pruned.dense
    assert at_once.pruned == later.pruned != pruned.pruned
    assert [site.name for site in later.sites] == [one.name for one in later.codes]
    found = llmprune.evaluate(tmp_path / "two", texts=[some["eval_text"]], seqlen=16, dtype="bfloat16").scores[0].value
    assert later.pruned is not None
    assert later.pruned.value == pytest.approx(found, rel=0.02)  # computed in float32 there
    assert later.size["bytes_after"] == sum(info.nbytes for info in open_checkpoint(tmp_path / "two").tensors.values())
    assert later.code_bits() == pytest.approx(bits + 16 / 32 * 2 / 3 + 16 / 16 / 3, abs=0.2)
    assert verify(tmp_path / "two").problems == ()
    assert verify(tmp_path / "two").matrices == len(later.sites)
    card = (tmp_path / "two" / "README.md").read_text()
    assert f"rounded to codes of {bits} bits, zeros kept" in card
    assert "compressed-tensors" in card
    page = llmprune.report(tmp_path / "two", tmp_path / "page.html")["runs"][0]
    assert f" && llmprune quantise pruned --bits {bits} " in page["command"]
    whole = llmprune.report(tmp_path / "one", tmp_path / "page1.html")["runs"][0]
    assert f" --bits {bits} " in whole["command"]
    assert "&&" not in whole["command"]
    logits = llmprune.load(tmp_path / "two", dense=True)(torch.tensor([[5, 6, 7, 8]])).logits[0]
    assert torch.allclose(torch.tensor(read_elsewhere(tmp_path / "two")["logits"]), logits.float(), atol=1e-2)


def test_pruned_trained_and_rounded_in_one_command(source: Path, some: dict, text: str, tmp_path: Path) -> None:
    """As the three commands one after the other; stopped while it rounds, it goes on there."""
    (tmp_path / "other.txt").write_text("Other words, of another text altogether. " * 40)
    asked = some | {
        "eval_text": str(tmp_path / "other.txt"),
        "sparsity": "2:4",
        "method": "magnitude",
        "recover": "4K",
        "bits": 4,
    }
    with pytest.raises(KeyboardInterrupt):
        llmprune.prune(source, output=tmp_path / "out", progress=StopAt(1), **asked)
    assert not (tmp_path / "out").exists()
    record = llmprune.prune(source, output=tmp_path / "out", **asked).record
    assert len(record.recoveries) == 1
    assert len(record.codes) == len(record.sites) == 21
    assert record.arguments["bits"] == 4
    steps = {name: value for name, value in asked.items() if name != "bits"}
    llmprune.prune(source, output=tmp_path / "trained", **steps)
    later = llmprune.quantise(tmp_path / "trained", tmp_path / "rounded", bits=4, samples=4, seqlen=16, batch_size=2).record
    first, second = weights(tmp_path / "out"), weights(tmp_path / "rounded")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (record.dense, record.pruned) == (later.dense, later.pruned)
    assert verify(tmp_path / "out").problems == ()
    command = llmprune.report(tmp_path / "out", tmp_path / "page.html")["runs"][0]["command"]
    assert " --bits 4 --recover 4K " in command
    assert "&&" not in command
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_package_that_reads_it_agrees(source: Path, some: dict, tmp_path: Path) -> None:
    """compressed-tensors validates the configuration and decompresses each layer to the same weights, bit for bit."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    for bits in (8, 4, 3):
        out = tmp_path / f"{bits}"
        llmprune.quantise(source, out, bits=bits, **some)
        raw = json.loads((out / "config.json").read_text())["quantization_config"]
        config = QuantizationConfig.model_validate(raw)
        assert "sparsity_config" not in raw
        stored = {name: own for file in out.glob("*.safetensors") for name, own in load_file(file).items()}
        mine, sizes = weights(out), set()
        for scheme in config.config_groups.values():
            kinds = [target.removeprefix("re:") for target in scheme.targets]
            for name in (name.removesuffix(".weight_packed") for name in stored if name.endswith("_packed")):
                if any(re.fullmatch(kind, name) for kind in kinds):
                    parts = {end: stored[f"{name}.{end}"] for end in ("weight_packed", "weight_scale", "weight_shape")}
                    read = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
                    assert torch.equal(read, mine[f"{name}.weight"]), name
                    sizes.add(scheme.weights.group_size)
        assert sizes == {32, 16}  # of 32 and of 48 columns


class StopAt(Progress):
    """Stands in for ^C while a block is rounded."""

    def __init__(self, block: int) -> None:
        self.at, self.notes = block, list[str]()

    def quantised(self, one: CodeRecord) -> None:
        if one.block == self.at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_that_was_stopped_goes_on(source: Path, some: dict, tmp_path: Path) -> None:
    asked = {"sparsity": "50%", "method": "sparsegpt", "bits": 4, **some}
    llmprune.prune(source, output=tmp_path / "whole", **asked)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        llmprune.prune(source, output=out, progress=StopAt(1), **asked)
    assert not out.exists()
    with pytest.raises(InputError, match="an unfinished run with other settings: --bits 4"):
        llmprune.prune(source, output=out, **(asked | {"bits": 3}))
    last = StopAt(9)
    llmprune.prune(source, output=out, progress=last, **asked)
    assert "the pruned model is there from an earlier run" in last.notes
    assert "going on after block 1, which an earlier run finished" in last.notes
    first, second = (
        {name: own for file in (tmp_path / name).glob("*.safetensors") for name, own in load_file(file).items()}
        for name in ("whole", "out")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


_TWO = """
import json, os, sys
port, source, out, how = sys.argv[1:]
rank = "0" if os.fork() else "1"
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
import llmprune
llmprune.quantise(source, out, **json.loads(how))
if rank == "0":
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("rounding", ["nearest", "refined"])
def test_two_processes_share_windows_and_rows(
    rounding: str, source: Path, some: dict, python: list[str], tmp_path: Path
) -> None:
    how = some | {"rounding": rounding, "dtype": "float32", "eval_text": "none"}
    one = llmprune.quantise(source, tmp_path / "one", **how).record
    command = [*python, "-c", _TWO, str(free_port()), str(source), str(tmp_path / "two"), json.dumps(how)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "two").problems == ()
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    if rounding == "nearest":  # the refined codes follow sums, which are in another order
        assert all(torch.equal(first[name], second[name]) for name in first)
    two = json.loads((tmp_path / "two" / "llmprune.json").read_text())["codes"]
    errors = sum(own["error"] for own in two), sum(own.error or 0 for own in one.codes)
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_verify_sees_what_is_not_as_recorded(source: Path, some: dict, tmp_path: Path) -> None:
    out = tmp_path / "out"
    llmprune.prune(source, output=out, sparsity="2:4", method="magnitude", bits=4, **some)
    file = next(
        file for file in sorted(out.glob("*.safetensors")) if "model.layers.0.mlp.up_proj.weight_packed" in load_file(file)
    )
    stored = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(stored | {f"{name}_packed": torch.full_like(stored[f"{name}_packed"], -1)}, file)
    problems = verify(out).problems
    assert any(f"{name}: not 2:4" in problem for problem in problems)
    assert any("sha256" in problem or file.name in problem for problem in problems)
    save_file({key: own for key, own in stored.items() if key != f"{name}_scale"}, file)
    assert any("in part only" in problem or "does not hold" in problem for problem in verify(out).problems)


def test_the_command(source: Path, some: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--calibration", some["calibration"], "--eval-text", some["eval_text"], "--samples", "4", "--seqlen", "16"]
    assert main(["quantise", "source", "--bits", "3", "--group-size", "16", *few]) == 0
    assert (tmp_path / "source-int3").is_dir()
    assert main(["verify", "source-int3"]) == 0
    assert main(["--model", "source", "--sparsity", "2:4", "--method", "magnitude", "--bits", "4", *few]) == 0
    assert (tmp_path / "source-2of4-magnitude-int4").is_dir()
    shown = capsys.readouterr().out
    assert "3 bits in 21 matrices, groups of 16 columns" in shown
    assert "bits a weight that is stored as a code, scales counted" in shown
    assert main(["quantise", "source", "--bits", "3", "--group-size", "16", *few]) == 0
    assert "source-int3 is complete" in capsys.readouterr().out
    assert main(["quantise", "source-int3", *few]) == 2
    assert "is already quantised" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "words"), [
    ({"bits": 5}, "bits 5 is impossible: give 8, 4 or 3"),
    ({"group_size": 5}, "group_size 5 does not divide the 32 columns of model.layers.0.self_attn.q_proj: give a divisor"),
    ({"group_size": 0}, "group_size 0 is impossible"),
    ({"rounding": "up"}, "unknown rounding 'up'; known: gptq, nearest, refined"),
    ({"skip": ("*nothing*",)}, "matches no site"),
])  # fmt: skip
def test_bad_input_is_one_line(options: dict, words: str, source: Path, some: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as told:
        llmprune.quantise(source, tmp_path / "out", **(some | options))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def spoiled(folder: Path) -> None:
    """A pruned weight is not zero any more."""
    file = next(path for path in sorted(folder.glob("*.safetensors")) if any("up_proj" in name for name in load_file(path)))
    tensors = load_file(file)
    name = next(name for name in tensors if "up_proj" in name)
    tensors[name][tensors[name] == 0] = 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_what_cannot_be_quantised(source: Path, some: dict, tmp_path: Path) -> None:
    llmprune.prune(source, output=tmp_path / "pruned", sparsity="2:4", method="magnitude", **some)
    llmprune.pack(tmp_path / "pruned", tmp_path / "packed")
    llmprune.quantise(source, tmp_path / "codes", **some)
    for folder, words in ((tmp_path / "packed", "is packed"), (tmp_path / "codes", "is already quantised")):
        with pytest.raises(InputError, match=words):
            llmprune.quantise(folder, tmp_path / "out", **some)
    with pytest.raises(InputError, match="is already quantised"):
        llmprune.prune(tmp_path / "codes", output=tmp_path / "out", sparsity="2:4", **some)
    with pytest.raises(InputError, match="is already quantised"):
        llmprune.recover(tmp_path / "codes", tmp_path / "out", text=some["calibration"], tokens="1K", seqlen=16)
    with pytest.raises(InputError, match="group_size has no effect here: it is there to round weights, with --bits"):
        llmprune.prune(source, output=tmp_path / "out", sparsity="2:4", group_size=16, **some)
    with pytest.raises(InputError, match="from folder to folder"):
        llmprune.prune(tiny_model("llama"), bits=4, calibration=tokens(4, 16))
    spoiled(tmp_path / "pruned")
    with pytest.raises(InputError, match=r"is not what its llmprune.json says .*sha256 differs.* to quantise it without"):
        llmprune.quantise(tmp_path / "pruned", tmp_path / "out", **some)
    (tmp_path / "pruned" / "config.json").write_text("{}")
    with pytest.raises(InputError):
        llmprune.quantise(tmp_path / "pruned", tmp_path / "out", **some)
    assert not (tmp_path / "out").exists()


def test_experts_are_stored_as_codes_all_or_none(tmp_path: Path) -> None:
    tiny_model("mixtral", **ALL["mixtral"]).save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match="beside codes transformers load experts as codes alone"):
        llmprune.prune(
            tmp_path / "source",
            output=tmp_path / "out",
            bits=4,
            skip=("*experts.1.*",),
            calibration=tokens(4, 16),
            batch_size=2,
        )


def test_targets_name_the_layers_that_are_codes_alone() -> None:
    groups = {"layers.0.up": 128, "layers.1.up": 128, "layers.0.down": 64, "layers.10.down": 64}
    raw = quantisation_config(4, groups, ["head", "layers.1.down"], None)
    targets = [scheme["targets"] for scheme in raw["config_groups"].values()]
    assert targets == [[r"re:layers\.\d+\.up"], ["layers.0.down", "layers.10.down"]]
    assert raw["ignore"] == ["head", "layers.1.down"]
    first = quantisation_config(4, groups, [], 64)["config_groups"]["group_0"]
    assert first["weights"]["group_size"] == 64


def test_groups_where_the_user_does_not_say() -> None:
    assert [default_group(columns) for columns in (4096, 704, 100, 48, 7)] == [128, 64, 100, 16, 7]
