"""`models/families.py` holds all names of families, and each of its rows is needed by the families that it states."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from safetensors.torch import load_file, save_file
from test_families import ALL, describe
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import llmprune
from llmprune.base.errors import InputError
from llmprune.models import families
from llmprune.models.checkpoint import Checkpoint
from llmprune.models.discover import find_blocks, unreached
from llmprune.models.experts import experts_per_token, is_experts
from llmprune.models.families import Coupling, FusedExperts, Name, Stricter
from llmprune.models.groups import neurons
from llmprune.models.heads import Heads
from llmprune.models.skeleton import Skeleton
from llmprune.steps.structured.configs import sizes_in, smaller_config

ROOT = Path(llmprune.__file__).parent
Row = Name | Coupling | FusedExperts | Stricter
TABLES: dict[str, tuple[Row, ...]] = {
    name: value if isinstance(value, tuple) else (value,) for name, value in vars(families).items() if name.isupper()
}
ROWS = [pytest.param(table, row, id=f"{table}-{i}") for table, rows in TABLES.items() for i, row in enumerate(rows)]
# families that need a row which none of the contract does
FURTHER: dict[str, dict] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention"], "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "n_groups": 1}
    | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 4}
    | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
}


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family, **(ALL | FURTHER)[family])


def siblings(model: PreTrainedModel) -> set[frozenset[str]]:
    """Names of the matrices that stand in one module, of each module of the blocks."""
    found: dict[str, set[str]] = {}
    for site in (site for block in describe(model) for site in block.sites):
        parent, _, name = site.name.rpartition(".")
        found.setdefault(parent, set()).add(name)
    return {frozenset(names) for names in found.values()}


def couples(row: Row, model: PreTrainedModel) -> bool:
    """Whether it is the first of its table that fits some module."""
    table = next(table for table in (families.FEED_FORWARD, families.ATTENTION) if row in table)
    firsts = (next((one for one in table if {*one.producers, one.consumer} <= names), None) for names in siblings(model))
    return row in firsts


def names_experts(row: Row, model: PreTrainedModel) -> bool:
    assert isinstance(row, FusedExperts)
    held = [dict(module.named_parameters()) for module in model.modules() if is_experts(module)]
    return any(row.first in names and row.last in names for names in held)


def routes(row: Row, model: PreTrainedModel) -> bool:
    """Whether it keeps a matrix from being pruned, or says why it is not."""
    assert isinstance(row, Name)
    skipped = {name: why for block in describe(model) for name, why in unreached(block).items()}
    return any(name.split(".")[-2] == row.name and why == "router" for name, why in skipped.items())


def sizes_neurons(row: Row, model: PreTrainedModel) -> bool:
    """Whether it is what changes where neurons are removed."""
    assert isinstance(row, Name)
    counts = set()
    for block in describe(model):
        with suppress(InputError):  # a hybrid's block without any
            counts |= {group.count for group in neurons(block)}
    return any(row.name in sizes_in(model.config.get_text_config(), (count, 4), None) for count in counts)


def lists_layers(row: Row, model: PreTrainedModel) -> bool:
    assert isinstance(row, Name)
    own = getattr(model.config.get_text_config(), row.name)
    return isinstance(own, list) and len(own) == len(find_blocks(model))


def is_stricter(row: Row, model: PreTrainedModel) -> bool:
    """Whether the family refuses what the other takes, and the smaller configuration is the other's."""
    assert isinstance(row, Stricter)
    sizes = {"hidden_size": 32, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    with pytest.raises(Exception, match="multiple"):
        AutoConfig.for_model(row.model_type, **sizes)
    AutoConfig.for_model(row.equal, **sizes)
    smaller = smaller_config(model.config, neurons=None, heads=Heads(3, 3, 8), layers=None)
    for name in row.biases:
        config = AutoConfig.for_model(row.model_type, **{name: True})
        with pytest.raises(InputError, match=f"^{row.title} with biases"):
            smaller_config(config, neurons=None, heads=Heads(3, 3, 8), layers=None)
    return (row.model_type, smaller.model_type) == (model.config.model_type, row.equal)


def is_a_setting(row: Row, model: PreTrainedModel) -> bool:
    assert isinstance(row, Name)
    return hasattr(CONFIG_MAPPING[model.config.model_type](), row.name)


def says_how_many(row: Row, model: PreTrainedModel) -> bool:
    assert isinstance(row, Name)
    return experts_per_token(model.config) == getattr(model.config, row.name) == 2


USES: dict[str, Callable[[Row, PreTrainedModel], bool]] = {
    "FEED_FORWARD": couples,
    "ATTENTION": couples,
    "EXPERTS": names_experts,
    "ROUTERS": routes,
    "EXPERTS_PER_TOKEN": says_how_many,
    "QUERY_HEADS": is_a_setting,
    "VALUE_HEADS": is_a_setting,
    "HEAD_WIDTH": is_a_setting,
    "IMPLIED_WIDTH": sizes_neurons,
    "WIDTHS": sizes_neurons,
    "LAYER_LISTS": lists_layers,
    "STRICTER": is_stricter,
}


@pytest.mark.parametrize(("table", "row"), [row for row in ROWS if row.values[0] != "LEFT_OVER"])
def test_every_family_of_a_row_uses_it(table: str, row: Row) -> None:
    assert row.families
    assert len(row.why) > 20
    for family in row.families:
        assert USES[table](row, model_of(family)), family


def test_what_a_checkpoint_may_hold_besides_is_known(saved) -> None:
    (row,) = families.LEFT_OVER
    assert row.families == ("llama",)
    folder = saved(model_of("llama"))
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    start = '"weight_map": {'
    index.write_text(index.read_text().replace(start, f'{start}"model.layers.0.self_attn.rotary_emb.inv_freq": "{file.name}",'))
    build = lambda: Skeleton(Checkpoint(folder), model_of("llama").config, torch.device("cpu"), torch.float32)  # noqa: E731
    build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.models.names.LEFT_OVER", ())
        with pytest.raises(InputError, match=r"unexpected .*inv_freq"):
            build()


def test_further_families_are_needed() -> None:
    only = {family for rows in TABLES.values() for row in rows if not set(row.families) & set(ALL) for family in row.families}
    assert only == set(FURTHER)


def names_in(row: Row) -> Iterator[str]:
    """All that a row calls by name."""
    for field in fields(row):
        value = getattr(row, field.name)
        if field.name == "settings":
            yield from (name for name, _ in value)
        elif field.name not in ("families", "why", "title"):
            yield from [value] if isinstance(value, str) else value


NAMES = {name for rows in TABLES.values() for row in rows for name in names_in(row)}
TYPES = set(CONFIG_MAPPING_NAMES)
CLASSES = set(CONFIG_MAPPING_NAMES.values()) | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
PLAIN = re.compile("[a-z]+")  # such a word is a family's name only where it stands alone
# where such a word does not stand for a family
EXCEPT = {
    ("*", "dense"): "the model that is not pruned: job, measure, reports and runs call it so, and look at no matrix",
    ("models/resolve.py", "llama"): "the bundled model's own name",
    ("models/discover.py", "router"): "the reason that is given for what is not pruned",
    ("job/options.py", "down_proj"): "an example of a pattern, in the help",
}


def known(source: str) -> set[str]:
    """The names of families in code: in strings that are no docstring, as attributes, as arguments, and as classes."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            words = {word for word in re.findall(r"\w+", node.value) if not PLAIN.fullmatch(word)}
            found |= ({node.value.lower()} | words) & (NAMES | TYPES) | words & CLASSES
        if isinstance(node, ast.Attribute) and not PLAIN.fullmatch(node.attr):
            found |= {node.attr} & (NAMES | CLASSES)
        if isinstance(node, ast.keyword):
            found |= {node.arg} & NAMES if node.arg and not PLAIN.fullmatch(node.arg) else set()
        if isinstance(node, ast.alias):
            found |= {node.name} & CLASSES
    return found


def test_no_other_module_names_a_family() -> None:
    paths = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
    found = {(path, name) for path in paths if path != "models/families.py" for name in known((ROOT / path).read_text())}
    models = ("models", "steps/structured", "formats", "cost", "stream")  # they look at matrices
    assert {("*" if (name, path.startswith(models)) == ("dense", False) else path, name) for path, name in found} == set(EXCEPT)


@pytest.mark.parametrize(("source", "names"), [
    ('if config.model_type == "llama": pass', {"llama"}),
    ('if config.model_type in ("Git", "gpt_oss"): pass', {"git", "gpt_oss"}),
    ("from transformers import MistralConfig", {"MistralConfig"}),
    ("transformers.LlamaForCausalLM(x)", {"LlamaForCausalLM"}),
    ('layer = f"{block}.q_proj.weight"', {"q_proj"}),
    ("make(head_dim=config.num_key_value_heads)", {"head_dim", "num_key_value_heads"}),
    ('skip = {"gate"}', {"gate"}),
    ('"""A Llama has a q_proj."""\nprint("the gate is open; see git")', set()),
])  # fmt: skip
def test_names_are_found(source: str, names: set[str]) -> None:
    assert known(source) == names
