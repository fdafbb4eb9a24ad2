"""Heads, neurons and layers are removed exactly, and what is saved loads with plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tokens
from rich.console import Console as RichConsole
from test_families import EXPERTS
from test_resume import weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmprune
from llmprune.base.errors import InputError
from llmprune.base.notation import Amount
from llmprune.base.processes import Ranks
from llmprune.cli.console import Console
from llmprune.data.pydoc import documents
from llmprune.data.windows import Texts, Windows
from llmprune.job.job import Job
from llmprune.job.options import PruneConfig
from llmprune.job.progress import Progress
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks
from llmprune.models.experts import observable
from llmprune.models.groups import heads, neurons
from llmprune.models.heads import Heads
from llmprune.models.resolve import BUNDLED
from llmprune.models.skeleton import Skeleton, load_config
from llmprune.output import resume
from llmprune.output.verify import verify
from llmprune.steps.structured.step import RemoveStructure
from llmprune.stream.activations import Activations
from llmprune.stream.source import ModelSource

IDS = tokens(6, 24)
PLAIN = {"calibration": IDS, "batch_size": 2}
OPTIONS = PLAIN | {"round_to": 4}
FAMILIES = ("llama", "mistral", "qwen3", "gemma3_text", "opt", "gpt2", "gpt_neox", "mixtral")
WITH_HEADS = ("llama", "mistral", "qwen3", "gemma3_text", "mixtral")
ALONE = {"num_key_value_heads": 4}  # every head has keys and values of its own


def model_of(family: str, **changes: object) -> PreTrainedModel:
    return tiny_model(family, **(EXPERTS.get(family, {}) | changes))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def close(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    return torch.allclose(logits(a), logits(b), rtol=1e-4, atol=1e-5)


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_nothing_reads_leave_without_a_trace(family: str, saved, tmp_path: Path) -> None:
    model = model_of(family)
    for block in ModelSource(model).blocks():
        for group in neurons(block):
            group.consumer.weight[:, 1::4] = 0
    record = llmprune.prune(saved(model), output=tmp_path / "out", neurons="25%", **OPTIONS).record
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert close(model, smaller)
    assert verify(tmp_path / "out").problems == ()
    assert record.structure["after"]["parameters"] == smaller.num_parameters() < model.num_parameters()
    assert all((one.kind, one.kept * 4) == ("neurons", one.count * 3) for one in record.removals)


@pytest.mark.parametrize("family", WITH_HEADS)
@pytest.mark.parametrize("whole", [True, False])
def test_heads_that_nothing_reads_leave_without_a_trace(family: str, whole: bool, saved, tmp_path: Path) -> None:
    """Two groups of two heads: the second group goes, or one head of each."""
    model = model_of(family)
    for block in ModelSource(model).blocks():
        o = heads(block, Heads.of(model.config), whole=whole).consumer.weight
        o.view(o.shape[0], 4, 8)[:, [2, 3] if whole else [0, 3]] = 0
    record = llmprune.prune(saved(model), output=tmp_path / "out", heads="2", **PLAIN).record
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert smaller.config.num_attention_heads == 2
    assert smaller.config.num_key_value_heads == (1 if whole else 2)
    assert close(model, smaller)
    assert record.structure["whole_groups_of_heads"] is whole
    assert record.structure["after"]["kv_bytes_a_token"] * (2 if whole else 1) == record.structure["before"]["kv_bytes_a_token"]


def test_three_of_four_heads_of_a_llama_are_saved_as_a_mistral(saved, tmp_path: Path) -> None:
    """Its configuration refuses three heads for a width of 32; with scaled rotary frequencies the two are still the same."""
    scaling = {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    }  # fmt: skip
    model = model_of("llama", rope_parameters=scaling, **ALONE)
    for block in ModelSource(model).blocks():
        o = heads(block, Heads.of(model.config), whole=True).consumer.weight
        o.view(32, 4, 8)[:, 1] = 0
    llmprune.prune(saved(model), output=tmp_path / "out", heads="25%", **PLAIN)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(smaller).__name__ == "MistralForCausalLM"
    assert smaller.config.sliding_window is None
    assert close(model, smaller)
    prompt = IDS[:1, :8]
    whole, cut = (m.generate(prompt, max_new_tokens=12, do_sample=False) for m in (model, smaller))
    assert torch.equal(whole, cut)
    assert "saved as a `MistralForCausalLM`" in (tmp_path / "out" / "README.md").read_text()


def test_layers_by_loss_are_those_of_brute_force(saved, tmp_path: Path) -> None:
    """Two of four, one after the other, each time trying the whole model without each layer."""
    model = model_of("llama", num_hidden_layers=4)
    record = llmprune.prune(saved(model), output=tmp_path / "out", layers="2", layer_score="loss", **PLAIN).record
    every, left = model.model.layers, [0, 1, 2, 3]

    def loss(layers: list[int]) -> float:
        model.model.layers = torch.nn.ModuleList(every[i] for i in layers)
        model.config.num_hidden_layers = len(layers)
        return float(torch.nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))

    for _ in range(2):
        left = min(([other for other in left if other != layer] for layer in left), key=loss)
    assert record.structure["removed_layers"] == sorted({0, 1, 2, 3} - set(left))
    loss(left)
    assert close(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_a_layer_that_does_nothing_is_the_one_removed(saved, tmp_path: Path) -> None:
    model = model_of("gemma3_text")  # sliding, full, sliding attention
    layer = find_blocks(model)["model.layers.1"]
    with torch.no_grad():
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.fill_(-1)  # Gemma's gain is 1 + weight
    record = llmprune.prune(saved(model), output=tmp_path / "out", layers="1", **PLAIN).record
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert record.structure["removed_layers"] == [1]
    assert smaller.config.layer_types == ["sliding_attention"] * 2
    assert close(model, smaller)


@pytest.mark.parametrize("family", FAMILIES)
def test_fitting_again_loses_less(family: str, saved, tmp_path: Path) -> None:
    source = saved(model_of(family))
    lost = {}
    for refit in (True, False):
        options = OPTIONS | {"neurons": "50%", "refit": refit, "score": "magnitude"} | ({"target": "dense"} if refit else {})
        record = llmprune.prune(source, output=tmp_path / str(refit), **options).record
        lost[refit] = [one.error for one in record.removals if one.block == 0]
    assert all(fitted < plain for fitted, plain in zip(lost[True], lost[False], strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_structure_first_then_weights(family: str, saved, tmp_path: Path) -> None:
    options = OPTIONS | {"neurons": "50%", "layers": "1", "sparsity": "2:4"} | ({} if family == "gpt2" else {"heads": "50%"})
    record = llmprune.prune(saved(model_of(family)), output=tmp_path / "out", **options).record
    assert verify(tmp_path / "out").problems == ()
    assert all(site.sparsity == 0.5 for site in record.sites)
    assert record.structure["removed_layers"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert smaller.num_parameters() == record.structure["after"]["parameters"] < record.structure["before"]["parameters"]
    assert record.size["bytes_after"] < record.size["bytes_before"]


_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.arange(3, 9)[None]
    both = [model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*both), folder
"""


def test_loads_in_a_fresh_process_and_generates_with_and_without_cache(tmp_path: Path) -> None:
    folders = []
    for family in FAMILIES:
        model_of(family).save_pretrained(tmp_path / family)
        asked = {"neurons": "25%", "layers": "1"} | ({"heads": "50%"} if family in WITH_HEADS else {})
        folders.append(str(tmp_path / f"{family}-smaller"))
        llmprune.prune(tmp_path / family, output=folders[-1], **OPTIONS, **asked)
    subprocess.run([sys.executable, "-c", _LOAD, *folders], check=True)


def test_untouched_tensors_stay_as_they_were_to_the_bit(saved, tmp_path: Path) -> None:
    model = model_of("llama").to(torch.bfloat16)
    llmprune.prune(saved(model), output=tmp_path / "out", neurons="25%", **OPTIONS)
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert smaller.dtype == torch.bfloat16
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "out"))
    assert {key for key in before | after if before.get(key) != after.get(key)} == {"intermediate_size"}
    for name, tensor in model.state_dict().items():
        if not any(part in name for part in ("gate_proj", "up_proj", "down_proj")):
            assert torch.equal(tensor, smaller.state_dict()[name])


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_layers_of_their_own_sizes(family: str, saved, tmp_path: Path) -> None:
    """Half of the first layer's neurons are never read: all that go, go from there, and nothing is lost."""
    model = model_of(family)
    first = next(ModelSource(model).blocks())
    for group in neurons(first):
        group.consumer.weight[:, ::2] = 0
    record = llmprune.prune(saved(model), output=tmp_path / "out", neurons="16.7%", per_layer=True, **OPTIONS).record
    width = record.removals[0].count
    gone = 3 * (width - round(0.833 * width / 4) * 4)
    assert [own["neurons"] for own in record.structure["per_layer"]] == [width - gone, width, width]
    smaller = llmprune.load(tmp_path / "out", device="cpu")
    assert close(model, smaller)
    assert smaller.num_parameters() == record.structure["after"]["parameters"] < model.num_parameters()
    assert torch.equal(*(smaller.generate(IDS[:1, :5], max_new_tokens=5, use_cache=cache) for cache in (True, False)))
    assert "llmprune.load" in (tmp_path / "out" / "README.md").read_text()


def test_heads_by_layer_then_weights_then_again(saved, tmp_path: Path) -> None:
    """Query heads of a layer may be any number there, as no configuration of the whole has to hold it."""
    model = model_of("llama", **ALONE)
    first = next(ModelSource(model).blocks())
    o = heads(first, Heads.of(model.config), whole=True).consumer.weight
    o.view(32, 4, 8)[:, :3] = 0
    record = llmprune.prune(saved(model), output=tmp_path / "out", heads="1", per_layer=True, **PLAIN).record
    assert [own["heads"] for own in record.structure["per_layer"]] == [1, 4, 4]
    assert close(model, llmprune.load(tmp_path / "out", device="cpu"))
    again = llmprune.prune(tmp_path / "out", output=tmp_path / "sparse", sparsity="2:4", method="wanda", **PLAIN).record
    assert len(again.sites) == 21
    assert llmprune.load(tmp_path / "sparse", device="cpu").model.layers[0].self_attn.q_proj.weight.shape == (8, 32)
    with pytest.raises(InputError, match="has layers of different sizes already"):
        llmprune.prune(tmp_path / "out", output=tmp_path / "more", neurons="25%", **OPTIONS)


def test_load_is_from_pretrained_for_all_others(saved) -> None:
    folder = saved(model_of("llama").to(torch.bfloat16))
    loaded = llmprune.load(folder, device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(loaded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_their_own_sizes_and_weights_in_one_command(dtype: str, saved, tmp_path: Path) -> None:
    """From a bf16 checkpoint; loaded, it is bf16 throughout and runs."""
    model = model_of("llama").to(torch.bfloat16)
    first = next(ModelSource(model).blocks())
    for group in neurons(first):
        group.consumer.weight[:, ::2] = 0
    options = {"neurons": "16.7%", "per_layer": True, "sparsity": "2:4", "method": "wanda", "dtype": dtype} | OPTIONS
    record = llmprune.prune(saved(model), output=tmp_path / "out", **options).record
    assert record.structure["differ_by_layer"]
    assert "second_order" in record.recipe["text"]
    assert "wanda" in record.recipe["text"]
    assert verify(tmp_path / "out").problems == ()
    loaded = llmprune.load(tmp_path / "out", device="cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(loaded)).all())
    assert llmprune.load(tmp_path / "out", device="cpu", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(InputError, match="unknown dtype 'bf16'"):
        llmprune.load(tmp_path / "out", device="cpu", dtype="bf16")


class Killed(BaseException):
    """Stands in for a signal."""


class Kill(Notes):
    """When the second phase has finished a block."""

    def site(self, site: object) -> None:
        if site.block == 1:
            raise Killed


def test_an_interrupted_run_goes_on_with_the_smaller_model(saved, tmp_path: Path) -> None:
    source = saved(model_of("llama"))
    options = {"neurons": "25%", "sparsity": "2:4", "quality": "balanced"} | OPTIONS
    whole = llmprune.prune(source, output=tmp_path / "whole", **options).record
    with pytest.raises(Killed):
        llmprune.prune(source, output=tmp_path / "out", progress=Kill(), **options)
    assert (tmp_path / ".out.first").is_dir()
    notes = Notes()
    record = llmprune.prune(source, output=tmp_path / "out", progress=notes, **options).record
    assert "the smaller model is there from an earlier run" in notes.notes
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert record.removals == whole.removals or [r.error for r in record.removals] == [r.error for r in whole.removals]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "out"}


def test_another_command_makes_its_own_smaller_model(saved, tmp_path: Path) -> None:
    source = saved(model_of("llama"))
    options = {"neurons": "25%", "sparsity": "2:4", "method": "wanda"} | OPTIONS
    with pytest.raises(Killed):
        llmprune.prune(source, output=tmp_path / "out", progress=Kill(), **options)
    record = llmprune.prune(source, output=tmp_path / "out", restart=True, **(options | {"neurons": "50%"})).record
    assert record.removals[0].kept == 24
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


WEIGHTS = PLAIN | {"sparsity": "2:4", "method": "wanda"}
SMALLER = OPTIONS | {"neurons": "25%"}
BOTH = SMALLER | WEIGHTS


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("first", "second", "words"), [
    (WEIGHTS, SMALLER, r"--sparsity 2:4 \(now None\), --neurons None \(now 25%\)"),
    (WEIGHTS, BOTH, r"--neurons None \(now 25%\)"),
    (BOTH, WEIGHTS, r"--neurons 25% \(now None\)"),
    (BOTH, SMALLER, r"--sparsity 2:4 \(now None\)"),
    (BOTH, BOTH | {"neurons": "50%"}, r"--neurons 25% \(now 50%\)"),
], ids=["weights, structure", "weights, both", "both, weights", "both, structure", "both, both"])  # fmt: skip
def test_an_unfinished_run_is_kept_from_other_commands(first: dict, second: dict, words: str, saved, tmp_path: Path) -> None:
    source = saved(model_of("llama"))
    for name in ("first", "second"):
        with pytest.raises(Killed):
            llmprune.prune(source, output=tmp_path / name, progress=Kill(), **first)
    left = contents(tmp_path)
    with pytest.raises(InputError, match=f"other settings: {words}.*; repeat them, or pass --restart to begin anew"):
        llmprune.prune(source, output=tmp_path / "first", **second)
    assert contents(tmp_path) == left
    notes = Notes()
    llmprune.prune(source, output=tmp_path / "first", progress=notes, **first)
    assert "going on after block 1, which an earlier run finished" in notes.notes
    llmprune.prune(source, output=tmp_path / "second", restart=True, **second)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "first", "second"}


class KillFirst(Notes):
    """Before the second phase has finished a block."""

    def site(self, site: object) -> None:
        raise Killed


class KillRemoval(Notes):
    def removed(self, removal: object) -> None:
        raise Killed


def killed(progress: Progress, source: Path, out: Path, options: dict) -> None:
    """A run that could tidy nothing up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            llmprune.prune(source, output=out, progress=progress, **options)


def test_a_finished_smaller_model_is_an_unfinished_run(saved, tmp_path: Path) -> None:
    """It is there, and no block of it is pruned."""
    source, out = saved(model_of("llama")), tmp_path / "out"
    whole = llmprune.prune(source, output=tmp_path / "whole", **BOTH).record
    killed(KillFirst(), source, out, BOTH)
    for other in (WEIGHTS, SMALLER):
        with pytest.raises(InputError, match="holds an unfinished run with other settings"):
            llmprune.prune(source, output=out, **other)
    notes = Notes()
    record = llmprune.prune(source, output=out, progress=notes, **BOTH).record
    assert "the smaller model is there from an earlier run" in notes.notes
    assert [removal.error for removal in record.removals] == [removal.error for removal in whole.removals]
    assert weights(out) == weights(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "whole", "out"}


@pytest.mark.parametrize("options", [SMALLER, BOTH], ids=["structure", "both"])
def test_half_a_smaller_model_is_begun_anew(options: dict, saved, tmp_path: Path) -> None:
    source, out = saved(model_of("llama")), tmp_path / "out"
    killed(KillRemoval(), source, out, options)
    assert (tmp_path / ".out.partial").is_dir()
    llmprune.prune(source, output=out, **WEIGHTS)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


class KillInSecond(Notes):
    """When the second block has lost something."""

    def removed(self, removal: object) -> None:
        if removal.block == 1:
            raise Killed


RESUMED = {
    "structure": SMALLER | {"eval_text": "text.txt", "calibration": "text.txt", "samples": 6, "seqlen": 24},
    "by layer": SMALLER | {"heads": "50%", "per_layer": True},
    "a backward pass": SMALLER | {"score": "gradient", "layers": "1", "refit": False},
    "both": BOTH,
}


@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_half_a_smaller_model_goes_on(
    family: str, options: dict, saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a bfloat16 checkpoint computed in float32, so that a lost rounding would show; to the last bit."""
    if family == "gpt2" and "heads" in options:
        pytest.skip("a GPT-2 with fewer heads does not load")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    source, out = saved(model_of(family, vocab_size=len(tokenizer)).to(torch.bfloat16)), tmp_path / "out"
    tokenizer.save_pretrained(source)
    monkeypatch.chdir(source.parent)
    Path("text.txt").write_text("\n\n".join(documents("evaluation"))[:20_000])
    whole = llmprune.prune(source, output=tmp_path / "whole", **options).record
    with pytest.raises(Killed):
        llmprune.prune(source, output=out, progress=KillInSecond(), **options)
    notes = Notes()
    record = llmprune.prune(source, output=out, progress=notes, **options).record
    assert any(note.startswith("going on after block 1") for note in notes.notes)
    assert weights(out) == weights(tmp_path / "whole")
    assert [(one.block, one.site, one.error) for one in record.removals] == [
        (one.block, one.site, one.error) for one in whole.removals
    ]
    assert (record.structure, record.dense, record.pruned) == (whole.structure, whole.dense, whole.pruned)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt", "whole", "out"}


def test_layers_without_padding_in_their_loss(saved, tmp_path: Path) -> None:
    """Calibration with padding chooses as the same windows without it do."""
    source = saved(model_of("llama", num_hidden_layers=5))
    padded = torch.cat([IDS, torch.full((6, 9), 7)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(6, 9, dtype=torch.long)], dim=1)
    chosen = []
    for name, calibration in {"plain": IDS, "padded": {"input_ids": padded, "attention_mask": mask}}.items():
        options = PLAIN | {"calibration": calibration, "layers": "2", "layer_score": "loss"}
        chosen.append(llmprune.prune(source, output=tmp_path / name, **options).record.structure["removed_layers"])
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(("family", "options", "words"), [
    ("llama", {"neurons": "100%"}, "neurons '100%' is impossible"),
    ("llama", {"neurons": "0"}, "neurons '0' is impossible"),
    ("llama", {"neurons": "some"}, "give a share to remove such as 25% or 0.25, or a count such as 4"),
    ("llama", {"neurons": "48"}, "would leave none"),
    ("llama", {"neurons": "1%"}, "rounds to none removed, in multiples of 4"),
    ("llama", {"heads": "4"}, "cannot be removed: 2 could stay"),
    ("llama", {"heads": "1%"}, "cannot be removed: 2 could stay"),
    ("llama", {"layers": "3"}, "layers 3 of 3 would remove all"),
    ("llama", {"layers": "5%"}, "layers 5% of 3 would remove none"),
    ("llama", {"neurons": "25%", "score": "second_ordr"}, "did you mean second_order"),
    ("llama", {"neurons": "25%", "round_to": 0}, "round_to 0 is impossible"),
    ("gpt2", {"heads": "50%"}, "looked for separate q, k, v and o"),
    ("opt", {"heads": "50%", "num_key_value_heads": None}, "do not load model.decoder.layers of that size"),
    ("llama", {"layers": "1", "per_layer": True}, "per_layer has no effect here: it is there to remove --heads or --neurons"),
    ("llama", {"neurons": ""}, "neurons '' is impossible"),
    ("llama", {"neurons": "25%", "skip": ["*.o_proj"]}, "skip has no effect here: it is there to prune weights"),
    ("llama", {"neurons": "25%", "quality": "best"}, "quality has no effect here"),
    ("llama", {"sparsity": "2:4", "score": "magnitude"}, "score has no effect here"),
    ("llama", {"neurons": "25%", "layer_score": "loss"}, "layer_score has no effect here: it is there to remove --layers"),
    ("llama", {"neurons": "25%", "sparsity": "2:4", "only": ["*.nothing"]}, "matches no site; sites are named like"),
    ("llama", {"neurons": "3", "round_to": 1, "sparsity": "2:4"}, "width of 45 columns is not a multiple of 4"),
    ("deepseek_v3", {"layers": "1"}, "is no parameter there"),
    ("mixtral", {}, "is required: pass --sparsity, --allocation, --heads, --neurons, --layers or --target-params, -bytes"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(family: str, options: dict, words: str, saved, tmp_path: Path) -> None:
    changes = {"num_key_value_heads": options.pop("num_key_value_heads")} if "num_key_value_heads" in options else {}
    source = saved(model_of(family, **changes))
    with pytest.raises(InputError, match=words):
        llmprune.prune(source, output=tmp_path / "out", **((OPTIONS if "neurons" in options else PLAIN) | options))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_model_in_memory_is_refused() -> None:
    with pytest.raises(InputError, match="pass the model's folder or Hub id"):
        llmprune.prune(model_of("llama"), neurons="25%", calibration=IDS)


def test_the_nearest_number_of_heads_that_loads(saved, tmp_path: Path) -> None:
    """Gemma 2 refuses three heads for a width of 32, and there is no other name for it."""
    notes = Notes()
    source = saved(model_of("gemma2", **ALONE))
    llmprune.prune(source, output=tmp_path / "out", heads="1", progress=notes, **PLAIN)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_attention_heads == 2
    (told,) = notes.notes
    assert told.startswith("heads 1 asks to remove 1 of 4 heads a layer, but 2 go: 3 heads would not load (")


SHARED = "2 heads share keys and values, in each of 2 groups; whole groups go, or as many heads of each"


@pytest.mark.parametrize(("options", "told"), [
    ({"heads": "1"}, [f"heads 1 asks to remove 1 of 4 heads a layer, but 2 go: {SHARED}"]),
    ({"heads": "25%"}, [f"heads 25% asks to remove 1 of 4 heads a layer, but 2 go: {SHARED}"]),
    ({"heads": "3"}, [f"heads 3 asks to remove 3 of 4 heads a layer, but 2 go: {SHARED}"]),
    ({"heads": "2"}, []),
    ({"heads": "40%"}, []),
    ({"neurons": "25%", "round_to": 32},
     ["neurons 25% asks to remove 12 of 48 neurons a layer, but 16 go: "
      "those that stay are a multiple of 32, which --round-to can change"]),
    ({"neurons": "30%", "round_to": 2}, []),
], ids=str)  # fmt: skip
def test_what_is_not_as_asked_is_said(options: dict, told: list[str], saved, tmp_path: Path) -> None:
    notes = Notes()
    record = llmprune.prune(saved(model_of("llama")), output=tmp_path / "out", progress=notes, **PLAIN, **options).record
    assert notes.notes == told
    if told:
        gone = {one.count - one.kept for one in record.removals}
        assert told[0].split(", but ")[1].startswith(f"{gone.pop()} go: ")
        assert not gone


@pytest.mark.parametrize("whole", [True, False])
def test_heads_are_counted_as_those_of_queries(whole: bool, saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the header, in every block's line and in the record, whether whole groups go or some of each."""
    model = model_of("llama")
    for block in ModelSource(model).blocks():
        o = heads(block, Heads.of(model.config), whole=whole).consumer.weight
        o.view(o.shape[0], 4, 8)[:, [2, 3] if whole else [0, 3]] = 0
    with Console(RichConsole(width=200)) as shown:
        record = llmprune.prune(saved(model), output=tmp_path / "out", heads="2", progress=shown, **PLAIN).record
    assert record.structure["whole_groups_of_heads"] is whole
    assert {(one.count, one.kept) for one in record.removals} == {(4, 2)}
    printed = capsys.readouterr().out
    assert "keep 2 of 4 heads" in printed
    assert printed.count("  2 of 4 heads, o_proj error") == 3


@pytest.mark.parametrize(
    ("text", "whole", "removed"), [("25%", 32, 8), ("0.25", 32, 8), ("4", 32, 4), ("12.5%", 32, 4), (" 1 ", 8, 1)]
)
def test_amounts(text: str, whole: int, removed: float) -> None:
    assert Amount.parse("heads", text).of(whole) == removed


@pytest.mark.parametrize(("family", "norm"), [
    ("llama", "post_attention_layernorm"),
    ("gemma3_text", "pre_feedforward_layernorm"),
    ("gpt2", "ln_2"),
    ("opt", "final_layer_norm"),
])  # fmt: skip
def test_gains_are_those_of_the_norm_before(family: str, norm: str) -> None:
    """Gemma's gain is one more than its weight; GPT-2 and OPT have a bias as well."""
    model = model_of(family)
    modules = list(find_blocks(model).values())
    feed = Activations.record(model, modules, Windows(IDS, "given"), batch=2, device=torch.device("cpu"))
    for block in ModelSource(model).blocks():
        (group,) = neurons(block)
        with torch.no_grad():
            found = feed.gains(block, group.producers)
        weight = block.module.get_submodule(norm).weight.detach()
        assert found.keys() == {site.name for site in group.producers}
        for gain in found.values():
            torch.testing.assert_close(gain, weight + (family == "gemma3_text"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_slopes_are_those_of_a_backward_through_the_whole_model(family: str, saved) -> None:
    """Streamed block by block from a folder, with padding, against one backward of the model in memory."""
    model = model_of(family)
    mask = torch.ones_like(IDS)
    mask[1, 20:] = 0
    seen: dict[str, torch.Tensor] = {}
    consumers = [group.consumer for block in ModelSource(model).blocks() for group in neurons(block)]
    with observable(model):
        for site in consumers:
            site.watch(lambda x, tokens, name=site.name: seen.__setitem__(name, x.retain_grad() or x))
        logits = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits
        labels = IDS.masked_fill(mask == 0, -100)[:, 1:]
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").backward()
    expected = {name: (x * x.grad).detach().reshape(-1, x.shape[-1]).sum(0) for name, x in seen.items() if x.grad is not None}
    texts = Texts(Windows(IDS, "given", mask), None, ())
    folder = saved(model)
    skeleton = Skeleton(Checkpoint(folder), load_config(folder), torch.device("cpu"), torch.float32)
    config = PruneConfig.create({"model": "-", "neurons": "25%", "score": "gradient", "round_to": 4, "batch_size": 4})
    with torch.no_grad():
        found = RemoveStructure(Job(config, None, Progress(), Ranks()), skeleton, None).scout(texts).slopes
    assert found.keys() == {site.name for site in consumers}
    for name, slope in expected.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-3, atol=1e-4)
