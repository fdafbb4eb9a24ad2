"""The model card that goes with a pruned checkpoint."""

from __future__ import annotations

import yaml

from llmprune.report.record import RunRecord


def model_card(record: RunRecord, name: str) -> str:
    """Markdown with Hub metadata: what was done, what was measured, how to load it."""
    return "\n".join([_front_matter(record), f"# {name}", "", _summary(record), "", *_numbers(record), "", _usage(name), ""])


def _front_matter(record: RunRecord) -> str:
    tags = ["llmprune", "pruned", "sparse", record.recipe["method"]]
    facts: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if record.model["hub_id"]:
        facts |= {"base_model": record.model["hub_id"], "base_model_relation": "finetune"}
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _summary(record: RunRecord) -> str:
    arguments, calibration = record.arguments, record.calibration
    return (
        f"`{record.model['name']}` pruned to **{arguments['sparsity']}** by `{record.recipe['text']}` with llmprune, one shot, "
        f"block by block. Calibration: {calibration['samples']} windows of {calibration['seqlen']} tokens of "
        f"{calibration['text']}, seed {calibration['seed']}."
    )


def _numbers(record: RunRecord) -> list[str]:
    weights = record.weights()
    rows = [
        ("pruned matrices", f"{len(record.sites)}"),
        ("zeros in them", f"{record.zeros() / weights:.4%} of {weights:,} weights"),
        ("parameters, all", f"{record.model['parameters']:,}"),
    ]
    if record.dense and record.pruned:
        protocol = f"{record.pruned.text}, {record.pruned.windows} windows of {record.pruned.length} tokens"
        rows += [
            (f"token perplexity before ({protocol})", f"{record.dense.value:.3f}"),
            ("token perplexity after, same windows", f"{record.pruned.value:.3f}"),
        ]
    return ["| measured in this run | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows)]


def _usage(name: str) -> str:
    return (
        "The zeros are stored: the files are as large as the dense model's and load as one.\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n\n'
        f"`llmprune verify {name}` re-checks every file's sha256 and every matrix's pattern; `llmprune.json` holds the "
        "arguments, versions and per-matrix errors of the run."
    )
