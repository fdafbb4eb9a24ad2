"""Every public verb. Each raises `InputError`, whose text is one line that says what, where and what to do.

| verb | what it does |
|---|---|
| `scan` | what each matrix loses at which sparsity |
| `prune` | prune a model, in memory or from folder to folder |
| `recover` | train what pruning left, its zeros kept |
| `quantise` | round weights to codes of few bits, zeros kept |
| `load` | a model that llmprune wrote, or any other; 2:4 layers packed |
| `pack`, `unpack` | a folder with 2:4 matrices as values and codes, and back, bit for bit |
| `evaluate` | perplexity and lm-eval's tasks, alone or beside the dense model |
| `compare` | models by methods by patterns |
| `bench` | a 2:4 model against itself dense, in time |
| `verify` | whether a folder is still what its record says |
| `report` | a page about one run or several |
| `push` | a folder to the Hub |
"""

from __future__ import annotations

from llmprune.formats.convert import pack, unpack
from llmprune.formats.loading import load
from llmprune.measure.bench import bench
from llmprune.measure.evaluate import evaluate
from llmprune.output.hub import push
from llmprune.output.verify import verify
from llmprune.reports.html import report
from llmprune.runs.compare import compare
from llmprune.runs.prune import prune, quantise
from llmprune.runs.recover import recover
from llmprune.runs.result import Result
from llmprune.runs.scan import scan

__all__ = [
    "Result", "bench", "compare", "evaluate", "load", "pack", "prune", "push", "quantise", "recover", "report", "scan",
    "unpack", "verify",
]  # fmt: skip
