"""Training what pruning left: zeros stay, the best step is kept, and a run that was killed goes on."""

from __future__ import annotations

import copy
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_families import EXPERTS
from test_ranks import free_port
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.base.errors import InputError
from llmprune.cli.main import main
from llmprune.cli.tables import recovery_table
from llmprune.data import pydoc
from llmprune.job.progress import Progress, Progressed
from llmprune.job.recovery import RATES, RecoverConfig
from llmprune.models.discover import find_blocks
from llmprune.models.resolve import BUNDLED
from llmprune.output.verify import verify
from llmprune.steps.recover.examples import likeliest
from llmprune.steps.recover.learning import Aim, losses, prepare

TRAIN = {"tokens": "1024", "batch_size": 4, "seqlen": 16, "eval_text": "none", "rate": 3e-3}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: own for file in folder.glob("*.safetensors") for name, own in load_file(file).items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"The {number} th word of it, {number * number}." for number in range(900)))
    return str(path)


def pruned(tmp_path: Path, text: str, family: str = "llama", **options: object) -> Path:
    """A tiny model with the bundled tokenizer, pruned."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["llama"])
    model = tiny_model(family, vocab_size=len(tokenizer), **EXPERTS.get(family, {}))
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "source")
    how = options or {"sparsity": "2:4", "method": "sparsegpt"}
    some = {"calibration": text, "samples": 4, "seqlen": 16, "eval_text": "none"}
    llmprune.prune(tmp_path / "source", output=tmp_path / "pruned", **some, **how)
    return tmp_path / "pruned"


@pytest.mark.parametrize(("family", "options"), [
    ("llama", {}),
    ("gpt2", {"sparsity": "60%", "method": "wanda", "skip": "*.c_attn"}),
    ("mixtral", {"sparsity": "50%", "method": "wanda"}),
    ("llama", {"neurons": "25%", "round_to": 4, "sparsity": "50%", "method": "wanda"}),
])  # fmt: skip
@pytest.mark.parametrize("train", ["kept", "lora"])
def test_zeros_stay_and_the_rest_learns(family: str, options: dict, train: str, text: str, tmp_path: Path) -> None:
    source = pruned(tmp_path, text, family, **options)
    record = llmprune.recover(source, tmp_path / "out", text=text, train=train, **TRAIN).record
    told, before, after = record.recoveries[-1], tensors(source), tensors(tmp_path / "out")
    assert told["loss_after"] < told["loss_before"]
    assert verify(tmp_path / "out").problems == ()
    assert before.keys() == after.keys()
    matrices = {site.tensor for site in record.sites}
    for name in before:
        if name in matrices:
            assert torch.equal(before[name] == 0, after[name] == 0), name
            assert not torch.equal(before[name], after[name]), name
        elif train == "lora" or not any(part in name for part in (".layers.", ".h.")):
            assert torch.equal(before[name], after[name]), name  # embeddings, final norm, head
    assert (tmp_path / "out" / "README.md").read_text().count("zeros kept, on 1,024 tokens") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_result_is_what_was_measured(text: str, tmp_path: Path, read_elsewhere) -> None:
    """The best step's weights as they are on disk give the held-out loss that the record has, by a naive twin; and they load
    in another process."""
    source = pruned(tmp_path, text)
    record = llmprune.recover(source, tmp_path / "out", text=text, **TRAIN).record
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "pruned", "out")]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    ids = tokenizer(Path(text).read_text() + "\n\n")["input_ids"]
    held_out = torch.tensor(ids[: 8 * 16]).view(8, 16)
    with torch.no_grad():
        dense, before, after = (functional.log_softmax(model(held_out).logits[:, :-1], -1) for model in models)
    twins = [float((dense.exp() * (dense - own)).sum(-1).mean()) for own in (before, after)]
    assert [record.recoveries[-1]["loss_before"], record.recoveries[-1]["loss_after"]] == pytest.approx(twins, rel=1e-4)
    found = read_elsewhere(tmp_path / "out")
    assert found


def test_losses_are_those_of_plain_formulas() -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    ids = torch.randint(3, 60, (3, 12))
    logits = [own(ids).logits[:, :-1].flatten(0, 1) for own in (model, teacher)]
    entropy = functional.cross_entropy(logits[0], ids[:, 1:].flatten())
    assert torch.allclose(losses(model, Aim(), {"input_ids": ids}), entropy)
    student, wanted = (functional.log_softmax(own, -1) for own in logits)
    kl = (wanted.exp() * (wanted - student)).sum(-1).mean()
    assert torch.allclose(losses(model, Aim(teacher, 1.0), {"input_ids": ids}), kl, rtol=1e-5)
    mixed = losses(model, Aim(teacher, 0.25), {"input_ids": ids})
    assert torch.allclose(mixed, 0.25 * kl + 0.75 * entropy, rtol=1e-5)


def all_float32(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: torch.float32 for name, _ in model.named_parameters()}


@pytest.mark.parametrize("top", [1, 5, 39])
def test_kept_predictions_stand_for_the_teacher(top: int) -> None:
    """Against sums over the kept tokens and all others together; with all but one kept that is the whole divergence."""
    model, teacher = (tiny_model("llama", seed, vocab_size=40).eval() for seed in (0, 1))
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, theirs = (one(ids).logits[:, :-1].double().softmax(dim=-1) for one in (model, teacher))
        inputs = {"input_ids": ids, **likeliest(teacher(ids).logits[:, :-1], top)}
        found = float(losses(model, Aim(None, 1.0), inputs))
        whole = float(losses(model, Aim(teacher, 1.0), {"input_ids": ids}))
    expected = 0.0
    for q, p in zip(own.flatten(0, 1), theirs.flatten(0, 1), strict=True):
        kept = p.argsort(descending=True)[:top].tolist()
        pairs = [(float(p[token]), float(q[token])) for token in kept]
        pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
        expected += sum(a * math.log(a / b) for a, b in pairs) / own[..., 0].numel()
    assert found == pytest.approx(expected, rel=5e-3)  # kept in float16
    assert found < whole * 1.005
    assert top < 39 or found == pytest.approx(whole, rel=5e-3)


def test_a_teacher_that_is_kept_on_the_disk(text: str, tmp_path: Path) -> None:
    """Stopped while it predicts and again while the model trains: the same weights as in one go, and the teacher was let go."""
    source = pruned(tmp_path, text)
    how = TRAIN | {"text": text, "teacher_top": 4096}
    told = llmprune.recover(source, tmp_path / "whole", **how).record.recoveries[-1]
    for stopping in (KillAtNote("the teacher has predicted"), KillAt(2)):
        with pytest.raises(Killed):
            llmprune.recover(source, tmp_path / "out", progress=stopping, **how)
    assert (tmp_path / ".out.partial" / "teacher" / "000000.safetensors").is_file()
    llmprune.recover(source, tmp_path / "out", **how)
    whole, out = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)
    beside = llmprune.recover(source, tmp_path / "beside", **(how | {"teacher_top": None})).record.recoveries[-1]
    assert told["loss_before"] == pytest.approx(beside["loss_before"], rel=1e-2)
    assert told["loss_after"] == pytest.approx(beside["loss_after"], rel=1e-2)
    assert {path.suffix for path in (tmp_path / "out").iterdir() if path.is_dir()} == set()


@pytest.mark.parametrize(("family", "name"), [
    ("llama", "model.layers.1.mlp.up_proj.weight"),
    ("gpt2", "transformer.h.1.mlp.c_fc.weight"),
    ("mixtral", "model.layers.1.mlp.experts.down_proj"),
])  # fmt: skip
def test_adapters_merge_exactly(family: str, name: str) -> None:
    """Logits are the same to rounding, zeros stay; and what was learned can be taken back to the last bit."""
    model = tiny_model(family, **EXPERTS.get(family, {}))
    weight = model.get_parameter(name)
    weight.data *= torch.rand_like(weight) > 0.5
    before, mask = weight.detach().clone(), weight.detach() != 0
    learning = prepare(model, "lora", {name}, all_float32(model), rank=4)
    optimizer = torch.optim.AdamW(learning.learned(), lr=1e-2)
    ids = torch.randint(3, 60, (3, 12))
    for _ in range(3):
        losses(model, Aim(), {"input_ids": ids}).backward()
        optimizer.step()
    with torch.no_grad():
        adapted = model(ids, use_cache=False).logits
        learning.settle()
        merged = model.get_parameter(name)
        assert torch.allclose(model(ids, use_cache=False).logits, adapted, atol=1e-6)
    assert torch.equal(merged != 0, mask)
    assert not torch.equal(merged, before)
    assert torch.linalg.matrix_rank((merged - before).flatten(0, -2)) > 4  # of the product under the mask
    learning.restore()
    assert torch.equal(model.get_parameter(name), before)


def test_moments_are_zero_where_weights_are(tmp_path: Path) -> None:
    """The masked gradient is that of the dense layout with the mask; AdamW's moments of pruned weights stay zero."""
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    mask = torch.rand_like(model.get_parameter(name)) > 0.5
    model.get_parameter(name).data *= mask
    twin = copy.deepcopy(model)
    learning = prepare(model, "kept", {name}, all_float32(model))
    optimizer = torch.optim.AdamW(learning.learned(), lr=1e-2, weight_decay=0.0)
    ids = torch.randint(3, 60, (3, 12))
    losses(twin, Aim(), {"input_ids": ids}).backward()
    for _ in range(3):
        optimizer.zero_grad()
        losses(model, Aim(), {"input_ids": ids}).backward()
        if not optimizer.state:
            assert torch.allclose(model.get_parameter(name).grad, twin.get_parameter(name).grad * mask, atol=1e-7)
        optimizer.step()
    state = optimizer.state[model.get_parameter(name)]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not state[moment][~mask].any()
        assert state[moment][mask].any()
    assert not model.get_parameter(name)[~mask].any()
    assert model.get_input_embeddings().weight.grad is None


def test_rewinding_sets_kept_weights_back(text: str, tmp_path: Path) -> None:
    """At a rate that moves nothing; what lies outside the blocks, or is pruned, is that of the pruned model."""
    source = pruned(tmp_path, text, skip="*.up_proj", sparsity="2:4", method="wanda")
    tiny_model("llama", seed=1, vocab_size=4096).save_pretrained(tmp_path / "early")
    how = TRAIN | {"text": text, "rate": 1e-12, "rewind": str(tmp_path / "early")}
    told = llmprune.recover(source, tmp_path / "out", **how).record
    before, early, after = (tensors(tmp_path / folder) for folder in ("pruned", "early", "out"))
    matrices = {site.tensor for site in told.sites}
    for name, own in after.items():
        kept = before[name] != 0 if name in matrices else torch.ones_like(own, dtype=torch.bool)
        expected = early[name] * kept if ".layers." in name else before[name]
        assert torch.allclose(own, expected, rtol=0, atol=1e-6), name
    assert verify(tmp_path / "out").problems == ()
    assert "weights of its blocks, set back to an earlier checkpoint, were" in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    tiny_model("llama", vocab_size=4096, intermediate_size=32).save_pretrained(tmp_path / "early")
    shapes = r"rewind is to another model: its model\.layers\.0\.mlp\.down_proj\.weight is 32 x 32, here it is 32 x 48"
    with pytest.raises(InputError, match=shapes):
        llmprune.recover(source, tmp_path / "other", **how)


def test_small_trains_norms_alone(text: str, tmp_path: Path) -> None:
    source = pruned(tmp_path, text)
    llmprune.recover(source, tmp_path / "out", text=text, train="small", **TRAIN)
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layers" in name and "norm" in name for name in changed)


BY_BLOCK = {name: value for name, value in TRAIN.items() if name != "rate"} | {"train": "blocks"}


@pytest.mark.parametrize(("family", "options"), [
    ("llama", {}),
    ("gpt2", {"sparsity": "60%", "method": "wanda", "skip": "*.c_attn"}),
    ("mixtral", {"sparsity": "50%", "method": "wanda"}),
    ("llama", {"layers": "1", "neurons": "25%", "round_to": 4}),
])  # fmt: skip
def test_blocks_learn_what_the_dense_ones_put_out(family: str, options: dict, text: str, tmp_path: Path) -> None:
    """Zeros stay; the error on record is that of the models on disk, by a naive twin; a record, card and page say so."""
    source = pruned(tmp_path, text, family, **options)
    record = llmprune.recover(source, tmp_path / "out", text=text, **BY_BLOCK).record
    told, before, after = record.recoveries[-1], tensors(source), tensors(tmp_path / "out")
    assert all(one["after"] < one["before"] for one in told["blocks"])
    assert verify(tmp_path / "out").problems == ()
    sparse = {site.tensor for site in record.sites}
    for name in before:
        inside = any(part in name for part in (".layers.", ".h."))
        assert torch.equal(before[name], after[name]) != inside or "router" in name or "gate.weight" in name, name
        assert name not in sparse or torch.equal(before[name] == 0, after[name] == 0), name
    dense, trained = (AutoModelForCausalLM.from_pretrained(tmp_path / own) for own in ("source", "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    ids = torch.tensor(tokenizer(Path(text).read_text() + "\n\n")["input_ids"])[: 64 * 16].view(64, 16)
    batches = ids.split(4)[4::8]
    with torch.no_grad():
        wanted, own = ([_last(model, batch) for batch in batches] for model in (dense, trained))
    errors = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(own, wanted, strict=True)]
    assert told["blocks"][-1]["after"] == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    assert "its blocks, one after the other, were trained to imitate" in (tmp_path / "out" / "README.md").read_text()
    assert llmprune.report(tmp_path / "out", tmp_path / "page.html")["runs"][0]["recoveries"][0]["fit"]["blocks"]


def _last(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The last block's outputs."""
    seen: list[torch.Tensor] = []
    blocks = list(find_blocks(model).values())
    handle = blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


class KillAfter(Progress):
    def __init__(self, blocks: int) -> None:
        self.left, self.fits = blocks, 0

    def reconstructed(self, result: object) -> None:
        self.fits += 1

    def block(self, index: int) -> None:
        if index == self.left:
            raise Killed


def test_a_training_by_block_goes_on_and_measures_perplexity(text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Other words, of another text altogether. " * 40)
    source, asked = pruned(tmp_path, text), {"text": text, **BY_BLOCK, "eval_text": str(other)}
    llmprune.recover(source, tmp_path / "whole", **asked)
    with pytest.raises(Killed):
        llmprune.recover(source, tmp_path / "out", progress=KillAfter(1), **asked)
    last = KillAfter(9)
    record = llmprune.recover(source, tmp_path / "out", progress=last, activations="disk", **asked).record
    assert last.fits == 2  # of three blocks
    whole, out = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)
    values = [
        llmprune.evaluate(tmp_path / name, texts=[str(other)], seqlen=16, dtype="float32").scores[0].value
        for name in ("source", "pruned", "out")
    ]
    assert record.dense is not None
    assert record.pruned is not None
    before = record.dense.value * math.exp(record.recoveries[-1]["excess_loss_before"])
    assert [record.dense.value, before, record.pruned.value] == pytest.approx(values, rel=1e-4)
    assert "output error of a block, mean on held-out" in recovery_table(record).columns[0]._cells[0]


_TWO = """
import json, os, sys
port, source, out, text, how = sys.argv[1:]
if not os.fork():
    os.environ |= {"RANK": "1", "LOCAL_RANK": "1"}
else:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
import llmprune
llmprune.recover(source, out, text=text, **json.loads(how))
if os.environ["RANK"] == "0":
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("how", [TRAIN, BY_BLOCK], ids=["kept", "blocks"])
def test_two_processes_share_the_windows(how: dict, python: list[str], text: str, tmp_path: Path) -> None:
    """Each step's gradient is that of all of its windows, as in one process, to rounding; masks are the same to the bit."""
    source = pruned(tmp_path, text)
    one = llmprune.recover(source, tmp_path / "one", text=text, **how).record.recoveries[-1]
    command = [*python, "-c", _TWO, str(free_port()), str(source), str(tmp_path / "two"), text, json.dumps(how)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert verify(tmp_path / "two").problems == ()
    two = json.loads((tmp_path / "two" / "llmprune.json").read_text())["recoveries"][-1]
    assert two["steps"] == one["steps"]
    assert [two["loss_before"], two["loss_after"]] == pytest.approx([one["loss_before"], one["loss_after"]], rel=1e-2)
    assert [loss for _, loss in two.get("held_out", ())] == pytest.approx(
        [loss for _, loss in one.get("held_out", ())], rel=1e-3
    )
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name in first:
        assert torch.equal(first[name] == 0, second[name] == 0)
        assert torch.allclose(first[name], second[name], atol=2e-3), name


class Killed(BaseException):
    """Stands in for a signal."""


class KillAt(Progress):
    def __init__(self, evaluations: int) -> None:
        self.left, self.steps = evaluations, list[int]()

    def trained(self, progressed: Progressed) -> None:
        self.steps.append(progressed.step)
        self.left -= 1
        if not self.left:
            raise Killed


class KillAtNote(Progress):
    def __init__(self, words: str) -> None:
        self.words = words

    def note(self, text: str) -> None:
        if self.words in text:
            raise Killed


def test_a_run_that_was_killed_goes_on(text: str, tmp_path: Path) -> None:
    source = pruned(tmp_path, text)
    asked = TRAIN | {"tokens": "2K"}
    llmprune.recover(source, tmp_path / "whole", text=text, **asked)
    with pytest.raises(Killed):
        llmprune.recover(source, tmp_path / "out", text=text, progress=KillAt(2), **asked)
    with pytest.raises(InputError, match=r"unfinished run with other settings: --rate 0.003 \(now 0.001\)"):
        llmprune.recover(source, tmp_path / "out", text=text, **(asked | {"rate": 1e-3}))
    last = KillAt(0)
    record = llmprune.recover(source, tmp_path / "out", text=text, progress=last, **asked).record
    assert last.steps[0] == 16  # of 31, the first that has no checkpoint
    assert [step for step, _ in record.recoveries[-1]["held_out"]] == [0, 8, 16, 24, 31]
    whole, out = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_one_command_prunes_and_trains(text: str, tmp_path: Path) -> None:
    """Stopped while it trains, it leaves the pruned model whole and goes on; in the end the trained one takes its place."""
    source = pruned(tmp_path, text).with_name("source")
    some = {"calibration": text, "samples": 4, "seqlen": 16, "eval_text": "none", "sparsity": "2:4", "method": "sparsegpt"}
    asked = some | {"output": str(tmp_path / "both"), "recover": "20K"}
    with pytest.raises(Killed):
        llmprune.prune(source, progress=KillAt(2), **asked)
    assert verify(tmp_path / "both").problems == ()
    record = llmprune.prune(source, **asked).record
    assert record.recoveries[-1]["loss_after"] < record.recoveries[-1]["loss_before"]
    assert record.arguments["recover"] == "20K"
    assert verify(tmp_path / "both").problems == ()
    assert all(
        torch.equal(own == 0, tensors(tmp_path / "pruned")[name] == 0) for name, own in tensors(tmp_path / "both").items()
    )
    page = llmprune.report(tmp_path / "both", tmp_path / "page.html")["runs"][0]
    assert " --recover 20K " in page["command"]
    assert "&&" not in page["command"]
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
    with pytest.raises(InputError, match=r"recover would train on .*words\.txt, which perplexity is measured on"):
        llmprune.prune(source, **(asked | {"output": str(tmp_path / "no"), "eval_text": text}))
    with pytest.raises(InputError, match="recover trains from folder to folder"):
        llmprune.prune(
            tiny_model("llama"), **(asked | {"output": str(tmp_path / "no"), "calibration": torch.ones(2, 8).long()})
        )


def test_pruning_and_training_in_turns(text: str, tmp_path: Path) -> None:
    """Stopped while the second turn trains it goes on there; the record starts where the first turn did."""
    source = pruned(tmp_path, text).with_name("source")
    (tmp_path / "other.txt").write_text("Other words, of another text altogether. " * 40)
    some = {"calibration": text, "samples": 4, "seqlen": 16, "eval_text": str(tmp_path / "other.txt"), "method": "sparsegpt"}
    asked = some | {"output": str(tmp_path / "out"), "recover": "5K", "sparsity": "30%,50%", "neurons": "25%", "round_to": 4}
    asked["rotate"] = True  # in the first turn only: later it would fill zeros
    with pytest.raises(Killed):
        llmprune.prune(source, progress=KillAt(5), **asked)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="of an unfinished run with other settings"):
        llmprune.prune(source, **(asked | {"sparsity": "30%,60%"}))
    last = KillAt(0)
    record = llmprune.prune(source, progress=last, **asked).record
    assert last.steps[0] == 32  # of 39, the first in the second turn that has no checkpoint
    assert [one.sparsity for one in record.sites] == pytest.approx([0.5] * len(record.sites), abs=0.01)
    assert (record.model["name"], record.arguments["sparsity"]) == ("source", "30%,50%")
    assert len(record.recoveries) == 2
    assert {told["teacher"] for told in record.recoveries} == {"source"}
    assert record.removals
    assert record.channels["rotated"]["costs"].keys() == {"hidden"}
    found = llmprune.evaluate(source, texts=[str(tmp_path / "other.txt")], seqlen=64, dtype="float32").scores[0].value
    assert record.dense is not None
    assert record.dense.value == pytest.approx(found, rel=1e-4)
    assert verify(tmp_path / "out").problems == ()
    page = llmprune.report(tmp_path / "out", tmp_path / "page.html")["runs"][0]
    assert page["asked"] == "25% fewer neurons, 50% by way of 30%"
    assert " --sparsity 30%,50% " in page["command"]
    assert "&&" not in page["command"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for wrong, words in (
        ({"recover": None}, "sparsity 30%,50% is for turns of pruning and training: pass --recover"),
        ({"sparsity": "50%,30%"}, "does not rise: each turn prunes more"),
        ({"sparsity": "30%,"}, "sparsity is empty"),
        ({"recover": "1000"}, "tokens 1000 is less than one step of 2 windows"),
    ):
        with pytest.raises(InputError, match=words):
            llmprune.prune(source, **(asked | wrong | {"overwrite": True}))


def test_trainings_follow_one_another(text: str, tmp_path: Path) -> None:
    """The record, the card, the page and the command that makes the model again have each of them."""
    llmprune.recover(pruned(tmp_path, text), tmp_path / "once", text=text, **BY_BLOCK)
    record = llmprune.recover(tmp_path / "once", tmp_path / "twice", text=text, train="lora", **TRAIN).record
    assert [own["arguments"]["train"] for own in record.recoveries] == ["blocks", "lora"]
    assert (tmp_path / "twice" / "README.md").read_text().count("Afterwards") == 2
    page = llmprune.report(tmp_path / "twice", tmp_path / "page.html")["runs"][0]
    assert len(page["recoveries"]) == 2
    first, second = page["command"].split(" && ")[1:]
    assert first.startswith("llmprune recover pruned --train blocks ")
    assert second.startswith("llmprune recover pruned-recovered --train lora ")
    assert verify(tmp_path / "twice").problems == ()


def test_the_table_names_each_text_once(text: str, tmp_path: Path) -> None:
    record = llmprune.recover(pruned(tmp_path, text), tmp_path / "out", text=text, **TRAIN).record
    first, *_ = recovery_table(record).columns[0].cells
    assert first == f"KL from the teacher on held-out windows of {text}"


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_what_diverges_changes_nothing(text: str, tmp_path: Path) -> None:
    source, notes = pruned(tmp_path, text), Notes()
    record = llmprune.recover(source, tmp_path / "out", text=text, progress=notes, **(TRAIN | {"rate": 0.9})).record
    assert any("training was stopped, for it diverged" in note for note in notes.notes)
    assert any("no step was better than the beginning" in note for note in notes.notes)
    assert record.recoveries[-1]["best"] == 0
    before, after = tensors(source), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_perplexity_is_measured_again(text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Other words, of another text altogether. " * 40)
    source = pruned(tmp_path, text)
    record = llmprune.recover(source, tmp_path / "out", text=text, **(TRAIN | {"eval_text": str(other)})).record
    assert record.dense is not None
    assert record.pruned is not None
    assert record.pruned.text == str(other)
    found = llmprune.evaluate(tmp_path / "out", texts=[str(other)], seqlen=16, dtype="float32")
    assert found.scores[0].value == pytest.approx(record.pruned.value, rel=1e-4)
    page = llmprune.report(tmp_path / "out", tmp_path / "page.html")["runs"][0]
    assert " && llmprune recover pruned --" in page["command"]
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


def test_no_paragraph_of_pydoc_is_trained_on_and_held_out() -> None:
    trained = {p for document in pydoc.training() for p in document.split("\n\n") if len(p) >= 40}
    assert trained
    for split in ("calibration", "evaluation"):
        assert not trained & {p for document in pydoc.documents(split) for p in document.split("\n\n")}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    home = tmp_path_factory.mktemp("bad")
    pruned(home, text)
    tiny_model("llama").save_pretrained(home / "other")
    short = home / "short.txt"
    short.write_text("Too short.")
    return home


@pytest.mark.parametrize(("options", "words"), [
    ({"model": "source"}, "holds no llmprune.json: recover trains what llmprune pruned"),
    ({"model": "nothing"}, "is no folder: name one that llmprune wrote"),
    ({"teacher": "other"}, "teacher other has a vocabulary of 96 tokens, the model one of 4096"),
    ({"text": "short.txt"}, "to train on, fewer than two windows of 16"),
    ({"text": "eval.txt", "eval_text": "eval.txt"}, "is what perplexity is measured on: train on another"),
    ({"tokens": "60"}, "tokens 60 is less than one step of 4 windows of 16 tokens"),
    ({"tokens": "many"}, "tokens 'many' is impossible: give a number such as 500K or 2M"),
    ({"rate": 3}, "rate 3 is impossible"),
    ({"rate": "fast"}, "rate must be a number, not 'fast'"),
    ({"train": "blocks"}, "rate has no effect here: blocks are fitted"),
    ({"train": "blocks", "rate": None, "loss": "ce"}, "loss has no effect here: blocks are fitted"),
    ({"train": "blocks", "rate": None, "tokens": "64"}, "4 windows of text .* are one batch of 4, and another is held out"),
    ({"activations": "disk"}, "activations has no effect here: it is there with --train blocks"),
    ({"rank": 4}, "rank has no effect here: it is there with --train lora"),
    ({"train": "small", "rewind": "source"}, "rewind has no effect here: it is there with --train kept"),
    ({"rewind": "nowhere"}, "unknown model 'nowhere'"),
    ({"loss": "ce", "teacher_top": 4}, "teacher_top has no effect here: with --loss ce"),
    ({"teacher_top": 0}, "teacher_top 0 is impossible: give at least 1"),
    ({"train": "all"}, "unknown train 'all'"),
    ({"loss": "mse"}, "unknown loss 'mse'"),
    ({"seqlen": 1}, "seqlen 1 is impossible: give at least 2"),
    ({"loss": "ce", "teacher": "source"}, "teacher has no effect here"),
    ({"output": "pruned"}, "is the model's own folder"),
    ({"tokenz": "1K"}, "unknown option 'tokenz'"),
])  # fmt: skip
def test_bad_input_is_one_line(options: dict, words: str, bad: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bad)
    before = sorted(path.name for path in bad.iterdir())
    asked = {"model": "pruned", "output": "out", "text": text, **TRAIN, **options}
    with pytest.raises(InputError, match=words):
        llmprune.recover(asked.pop("model"), asked.pop("output"), **asked)
    assert sorted(path.name for path in bad.iterdir()) == before


def test_the_command_reads_every_option(text: str, tmp_path: Path) -> None:
    source = pruned(tmp_path, text)
    asked = ["--tokens", "256", "--rate", "2e-3", "--batch-size", "4", "--seqlen", "16", "--seed", "3", "--train", "lora"]
    asked += ["--rank", "2", "--loss", "mix", "--text", text, "--eval-text", "none", "--output", str(tmp_path / "out")]
    assert main(["recover", str(source), *asked]) == 0
    told = json.loads((tmp_path / "out" / "llmprune.json").read_text())["recoveries"][-1]
    assert (told["rate"], told["arguments"]["rate"], told["arguments"]["rank"], told["steps"]) == (2e-3, 2e-3, 2, 4)


def test_wider_models_are_trained_more_slowly() -> None:
    """As measured at width 256 and below, and as published at 4096."""
    rates = {train: [RecoverConfig(model=".", train=train).peak(width) for width in (128, 256, 4096)] for train in RATES}
    assert rates["kept"] == pytest.approx([3e-4, 3e-4, 2e-5], rel=0.1)
    assert rates["lora"] == pytest.approx([2e-3, 2e-3, 5e-4])
    assert rates["small"] == pytest.approx([1e-3, 1e-3, 1e-3])
    assert RecoverConfig(model=".", rate=0.1).peak(4096) == 0.1
