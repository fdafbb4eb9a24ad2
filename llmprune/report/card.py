"""The model card that goes with a pruned checkpoint."""

from __future__ import annotations

import yaml

from llmprune.report.record import RunRecord


def model_card(record: RunRecord, name: str) -> str:
    """Markdown with Hub metadata: what was done, what was measured, how to load it."""
    return "\n".join(
        [_front_matter(record), f"# {name}", "", _summary(record), "", *_numbers(record), "", _usage(name, record), ""]
    )


def _front_matter(record: RunRecord) -> str:
    tags = ["llmprune", "pruned", *(["structured-pruning"] if record.structure else [])]
    tags += ["sparse", record.recipe["method"]] if record.arguments["sparsity"] else []
    facts: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if record.model["hub_id"]:
        facts |= {"base_model": record.model["hub_id"], "base_model_relation": "finetune"}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _summary(record: RunRecord) -> str:
    calibration, asked = record.calibration, _asked(record)
    return (
        f"`{record.model['name']}` pruned to **{asked}** by `{record.recipe['text']}` with llmprune, one shot, "
        f"block by block. Calibration: {calibration['samples']} windows of {calibration['seqlen']} tokens of "
        f"{calibration['text']}, seed {calibration['seed']}."
    )


def _asked(record: RunRecord) -> str:
    arguments = record.arguments
    gone = [f"{arguments[what]} fewer {what}" for what in ("heads", "neurons", "layers") if arguments[what]]
    gone += [f"{arguments['target_params']} of its parameters"] if arguments["target_params"] else []
    return ", ".join(gone + ([arguments["sparsity"]] if arguments["sparsity"] else []))


def _numbers(record: RunRecord) -> list[str]:
    weights = record.weights()
    rows = [("parameters of the dense model", f"{record.model['parameters']:,}")]
    for what, before in record.structure.get("before", {}).items():
        rows.append((what.replace("_", " ") + ", before and after", f"{before:,} and {record.structure['after'][what]:,}"))
    if record.sites:
        rows += [
            ("pruned matrices", f"{len(record.sites)}"),
            ("zeros in them", f"{record.zeros() / weights:.4%} of {weights:,} weights"),
        ]
    if record.dense and record.pruned:
        protocol = f"{record.pruned.text}, {record.pruned.windows} windows of {record.pruned.length} tokens"
        rows += [
            (f"token perplexity before ({protocol})", f"{record.dense.value:.3f}"),
            ("token perplexity after, same windows", f"{record.pruned.value:.3f}"),
        ]
    return ["| measured in this run | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]


def _usage(name: str, record: RunRecord) -> str:
    stored = "The zeros are stored: the files are as large as the dense model's and load as one.\n\n"
    other = ""
    if record.structure and record.structure["architecture"] != record.model["class"]:
        other = (
            f"It is saved as a `{record.structure['architecture']}`: a `{record.model['class']}` refuses this number of heads. "
            "Without biases and sliding windows the two are the same mathematics.\n\n"
        )
    if record.structure.get("differ_by_layer"):
        how = f'import llmprune\n\nmodel = llmprune.load("{name}")'
        other += "Its layers differ in size, which `from_pretrained` does not build.\n\n"
    else:
        how = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
        )
    return (
        f"{stored if record.sites else ''}{other}```python\n{how}\n```\n\n"
        f"`llmprune verify {name}` re-checks every file's sha256 and every matrix's pattern; `llmprune.json` holds the "
        "arguments, versions and per-matrix errors of the run."
    )
