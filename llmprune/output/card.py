"""The model card that goes with a pruned checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load

from llmprune.base.words import count, literal
from llmprune.cost.footprint import changes
from llmprune.job.naming import asked_text
from llmprune.job.record import COMPUTED, Perplexity, RunRecord, versions
from llmprune.job.recovery import BLOCKS, measure, shown
from llmprune.job.speedup import speed_rows
from llmprune.output.again import NO_COMMAND, again
from llmprune.output.public import public_run

_LICENCE = ("license", "license_name", "license_link")


def licence(folder: Path) -> dict[str, str]:
    """What the model card in a folder says of the licence, under the Hub's own names; nothing where it does not."""
    try:
        facts = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {name: facts[name] for name in _LICENCE if isinstance(facts.get(name), str)}


def model_card(record: RunRecord, name: str) -> str:
    """Markdown with Hub metadata: what was done, what was measured, how to load it, its limits, how to make it again. It may
    be shown to others: local paths are cut to their last names.

    Args:
        name: what it is to be loaded by: a folder, or a repository on the Hub.
    """
    record = public_run(record)
    parts = [
        f"{_front_matter(record, name)}# {name}",
        _summary(record),
        "\n".join(_numbers(record)).rstrip(),
        _usage(name, record),
        _limits(record),
        _made_with(record),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(record: RunRecord, name: str) -> str:
    tags = ["llmprune", "pruned", *(["structured-pruning"] if record.structure else [])]
    tags += ["sparse", record.recipe["method"]] if record.sites else []
    tags += ["quantized", "compressed-tensors"] if record.codes else []
    facts = {
        "library_name": "llmprune" if record.structure.get("differ_by_layer") else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
        **record.model.get("license", {}),
    }
    if record.model["hub_id"]:
        # the Hub knows adapter, merge, quantized and finetune: weights of the same precision, with other values
        facts |= {"base_model": record.model["hub_id"], "base_model_relation": "quantized" if record.codes else "finetune"}
    measured = [("", record.pruned), (" of the dense model", record.dense)]
    results = [_result(found, whose) for whose, found in measured if found and math.isfinite(found.value)]
    if results:
        facts |= {"eval_results": results, "model_name": name.rpartition("/")[2]}
    return f"---\n{ModelCardData(**facts).to_yaml()}\n---\n\n"


def _result(found: Perplexity, whose: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=found.text,
        dataset_name=found.text,
        metric_type="perplexity",
        metric_value=found.value,
        metric_name=f"token perplexity{whose}, {count(found.windows, 'window')} of {found.length} tokens{found.computed()}",
    )


def _summary(record: RunRecord) -> str:
    calibration, asked = record.calibration, asked_text(record.arguments)
    once = "" if record.recoveries else "one shot, "
    return (
        f"`{record.model['name']}` pruned to **{asked}** by `{record.recipe['text']}` with llmprune, {once}"
        f"block by block. Calibration: {count(calibration['samples'], 'window')} of {calibration['seqlen']} tokens of "
        f"{calibration['text']}, seed {calibration['seed']}.{''.join(map(_trained, record.recoveries))}{_rounded(record)}"
    )


def _rounded(record: RunRecord) -> str:
    """What quantising did, in a sentence."""
    if not record.codes:
        return ""
    apart = sum(not one.coded for one in record.codes)
    error = record.rounding_error()
    lost = "" if error is None else f", which changed what a matrix puts out by {error:.2%} (squared, mean)"
    others = f" {apart} of them are stored as the weights that they came to." if apart else ""
    return (
        f" In the end the weights of {count(len(record.codes), 'matrix')} were rounded to codes of {record.codes[0].bits} "
        f"bits, zeros kept{lost}.{others}"
    )


def _trained(recovery: Mapping[str, Any]) -> str:
    """What a training afterwards did, in a sentence."""
    asked = recovery["arguments"]
    loss, what = asked["loss"], asked["train"]
    before, after = (shown(asked, recovery[name]) for name in ("loss_before", "loss_after"))
    imitate = f"to imitate `{recovery['teacher']}`"
    aim = {"kd": imitate, "ce": "to predict the text"}.get(loss, f"{imitate} and predict the text")
    trained = {
        "kept": "the kept weights of its blocks",
        "small": "the norms and biases of its blocks",
        BLOCKS: "its blocks, one after the other,",
    }.get(what, "adapters on its pruned matrices (merged, under their masks)")
    begun = ", set back to an earlier checkpoint," if asked.get("rewind") else ""
    return (
        f" Afterwards {trained}{begun} were trained {aim}, zeros kept, on {recovery['tokens']:,} tokens of {recovery['text']}; "
        f"on held-out windows of that text the {measure(asked, 'it')} went from {before} to {after}"
        f"{'' if what == BLOCKS else ' nats a token'}."
    )


def _numbers(record: RunRecord) -> list[str]:
    """What was measured, and apart from it what was computed."""
    measured: list[tuple[str, str]] = []
    if record.sites:
        share = f"{record.zeros() / record.weights():.4%} of {count(record.weights(), 'weight')}"
        measured += [("pruned matrices", f"{len(record.sites)}"), ("zeros in them", share)]
    if record.dense and record.pruned:
        found = record.pruned
        protocol = f"{found.text}, {count(found.windows, 'window')} of {found.length} tokens{found.computed()}"
        measured += [
            (f"token perplexity before ({protocol})", f"{record.dense.value:.3f}"),
            ("token perplexity after, same windows", f"{found.value:.3f}"),
        ]
    for what, *values in speed_rows(record.structure):
        measured.append((what, " and ".join(value for value in values if value)))
    computed = [("parameters of the dense model", f"{record.model['parameters']:,}")]
    for what, before, after in changes(record.structure, record.recipe):
        computed.append((f"{what}, before and after", f"{before:,} and {after:,}"))
    return [*_rows("measured in this run", measured), *_rows(COMPUTED, computed)]


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    """A table, and what sets it apart from the next; nothing without rows."""
    return [f"| {title} | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows), ""] if rows else []


def _usage(name: str, record: RunRecord) -> str:
    stored = "The zeros are stored: the files are as large as the dense model's and load as one.\n\n" if record.sites else ""
    if record.codes:
        stored = (
            f"{record.code_bits():.2f} bits a weight that is stored as a code, scales counted; transformers read them with "
            "`pip install compressed-tensors`, and compute with the weights that they stand for.\n\n"
        )
    other = ""
    if record.structure and record.structure["architecture"] != record.model["class"]:
        other = (
            f"It is saved as a `{record.structure['architecture']}`: a `{record.model['class']}` refuses this number of heads. "
            "Without biases and sliding windows the two are the same mathematics.\n\n"
        )
    if record.structure.get("differ_by_layer"):
        how = f"import llmprune\n\nmodel = llmprune.load({literal(name)})"
        other += "Its layers differ in size, which `from_pretrained` does not build.\n\n"
    else:
        how = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({literal(name)})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({literal(name)})"
        )
    return (
        f"{stored}{other}```python\n{how}\n```\n\n"
        "`llmprune verify` with the folder's path re-checks every file's sha256 and every matrix's pattern; `llmprune.json` "
        "holds the arguments, versions and per-matrix errors of the run."
    )


def _limits(record: RunRecord) -> str:
    told = "The perplexity above is all that was measured on text: other texts, tasks and languages may lose more."
    if not (record.dense and record.pruned):
        told = "Nothing was measured on text: evaluate it before you use it."
    if record.sites:
        told += " Zeros make nothing faster by themselves: that takes kernels for them, as there are for 2:4."
    if record.codes:
        told += " Codes make it smaller; nothing is faster by them without kernels."
    source = " The source model's own limits and licence hold on." if record.model["hub_id"] else ""
    return f"## Limits\n\n{told}{source}"


def _made_with(record: RunRecord) -> str:
    command = again(record)
    how = f"```bash\n{command}\n```" if command else NO_COMMAND
    made_with = ", ".join(f"{package} {version}" for package, version in versions().items())
    return f"## Made with\n\n{how}\n\nVersions: {made_with}; {record.compute['dtype']} on {record.compute['device']}."
