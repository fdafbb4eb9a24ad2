"""llmprune beside llm-compressor: the same model, calibration tokens and patterns, turn about on one machine.

    python scripts/compare_peers.py --output eval/results/peers.json [--model llama] [--threads 1] [--methods sparsegpt fast]
    python scripts/compare_peers.py --output eval/results/peers_bits.json --bits 4

With --bits weights are rounded afterwards, in groups of 64 columns: by llm-compressor with GPTQ on the pruned model, by
llmprune with GPTQ too and, for presets, as --bits does by default; and the dense model is.

Makes a virtual environment for llm-compressor (from PyPI) in --environment and keeps it there. Each cell is a process of
its own: it loads the model in the dtype, prunes it, and saves it; seconds are those of the pruning call, peak memory that of
the process. Perplexity of all is then measured by the same code, in float32, on held-out text that no calibration saw. That
both pruned the same matrices is checked. A preset is measured of llmprune alone. Cells that the output file has with the same
settings are kept, so that it can be stopped and run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.base.words import count
from llmprune.data.windows import calibration_windows
from llmprune.job.recipes import QUALITIES
from llmprune.job.record import excess_loss, versions
from llmprune.measure.perplexity import perplexity
from llmprune.models.discover import find_blocks
from llmprune.models.resolve import resolve
from llmprune.runs.compare_texts import dense_perplexity, evaluation, load_float32

PEER, TORCH = "llmcompressor==0.14.0.1", "torch==2.13.0"
METHODS, PATTERNS = ("wanda", "sparsegpt"), ("2:4", "50%", "60%")
BITS_METHODS, BITS_PATTERNS, GROUP = ("sparsegpt", "balanced"), ("dense", "2:4", "50%"), 64

_COMMON = """
import json, resource, sys, time
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, tokens, method, pattern, bits, group, threads, dtype, out = sys.argv[1:]
torch.set_num_threads(int(threads))
ids = load_file(tokens)["ids"]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

def zeros(model):
    blocks = ((name, own) for name, own in model.named_modules() if type(own).__name__ == "Linear" and ".layers." in name)
    return {{name: own.weight == 0 for name, own in blocks}}

was = {{}}
{prune}
now = zeros(model)
revived = sum(int((own & ~now[name]).sum()) for name, own in was.items()) / max(sum(int(own.sum()) for own in was.values()), 1)
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
names = AutoModelForCausalLM.from_pretrained(folder).state_dict()
save_file({{name: value.clone() for name, value in model.state_dict().items() if name in names}}, out)
print(json.dumps({{"seconds": seconds, "peak_memory_bytes": 1024 * peak, "revived": revived, "version": version}}))
"""
_OURS = """
import llmprune
from llmprune.job.recipes import QUALITIES
how = {"calibration": ids, "eval_text": "none", "batch_size": 8}
if pattern != "dense":
    how |= {"sparsity": pattern, "quality" if method in QUALITIES else "method": method}
start = time.perf_counter()
if bits == "0":
    llmprune.prune(model, **how)
else:
    how |= {"bits": int(bits), "group_size": int(group), "rounding": "refined" if method in QUALITIES else "gptq"}
    llmprune.prune(folder, output=out + ".folder", dtype=dtype, overwrite=True, **how)
seconds, version = time.perf_counter() - start, llmprune.__version__
if bits != "0":
    model = llmprune.load(out + ".folder", dtype=dtype, dense=True)
    if pattern != "dense":  # the same once more without codes: what was zero before them
        for name in ("bits", "group_size", "rounding"):
            how.pop(name)
        llmprune.prune(folder, output=out + ".pruned", dtype=dtype, overwrite=True, **how)
        was = zeros(llmprune.load(out + ".pruned", dtype=dtype, dense=True))
"""
_THEIRS = """
from datasets import Dataset
from llmcompressor import __version__ as version, oneshot
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.quantization import GPTQModifier
kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
structure = {"mask_structure": pattern} if ":" in pattern else {}
kept, _, of = pattern.partition(":")
share = 1 - int(kept) / int(of) if of else float(pattern.rstrip("%")) / 100 if pattern != "dense" else 0
recipes = []
if pattern != "dense":
    recipes.append(kind(sparsity=share, targets=["Linear"], ignore=["re:.*lm_head"], **structure))
if bits != "0":
    weights = {"num_bits": int(bits), "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group)}
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipes.append(GPTQModifier(config_groups=scheme, ignore=["re:.*lm_head"]))
rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
start = time.perf_counter()
for number, recipe in enumerate(recipes):
    if number:
        was = zeros(model)
    oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
            shuffle_calibration_samples=False, batch_size=8, pipeline="sequential")
seconds = time.perf_counter() - start
"""


def make_environment(folder: Path) -> Path:
    """The Python of a virtual environment that has llm-compressor."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder} with {PEER}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", TORCH, PEER], check=True)
    return python


def run(python: Path, code: str, arguments: list[str]) -> dict[str, Any]:
    """What a cell's process measured of itself."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if code is _THEIRS:
        environment.pop("PYTHONPATH")
    command = [str(python), "-c", _COMMON.format(prune=code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"a cell failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def share(pattern: str) -> float:
    """The fraction of zeros that a pattern asks for."""
    if pattern == "dense":
        return 0.0
    kept, _, of = pattern.partition(":")
    return 1 - int(kept) / int(of) if of else float(pattern.rstrip("%")) / 100


def same_task(model: PreTrainedModel, tool: str, pattern: str, bits: int) -> float:
    """The share of zeros among the weights of the blocks' linear layers: the pattern's, and none elsewhere, else the two do not
    compare. A share of each row may be rounded down to whole weights, as llm-compressor's Wanda does. With `bits`, weights
    are rounded to 0, too, and llm-compressor rounds pruned ones to others; a group has no more values than there are codes.
    """
    blocks = [module for block in find_blocks(model).values() for module in block.modules() if isinstance(module, nn.Linear)]
    inside = 1 - sum(int(own.weight.count_nonzero()) for own in blocks) / sum(own.weight.numel() for own in blocks)
    embeddings = model.get_parameter("model.embed_tokens.weight")
    outside = 1 - int(embeddings.count_nonzero()) / embeddings.numel()
    few = all(values(own.weight) <= 2**bits for own in blocks) if bits else True
    if (not bits and abs(inside - share(pattern)) > 4e-3) or outside > 1e-3 or not few:
        raise SystemExit(f"{tool} left {inside:.1%} zeros in the blocks and {outside:.1%} in the embeddings: not comparable")
    return inside


def values(weight: Tensor) -> int:
    """The most different values that a group of columns has."""
    return max(len(group.unique()) for group in weight.unflatten(1, (-1, GROUP)).flatten(0, 1)[:64])


def table(result: dict[str, Any]) -> str:
    rounded = f", then {result['bits']} bits" if result.get("bits") else ""
    more = " pruned, not zero |" if rounded else ""
    lines = [
        "# Beside llm-compressor",
        "",
        "Written by `scripts/compare_peers.py`. "
        f"Model `{result['model']}`, dense perplexity {result['dense']:.2f}; "
        f"{count(result['samples'], 'calibration window')} of {result['length']} tokens, the same for both; "
        f"{count(result['windows'], 'evaluation window')}; {result['dtype']}, "
        f"{count(result['threads'], 'CPU thread')}, {result['date']}.",
        "",
        f"| pattern{rounded} | method | tool | zeros |{more} perplexity | excess loss | seconds | peak memory |",
        f"|---|---|---|---:|{'---:|' if rounded else ''}---:|---:|---:|---:|",
    ]
    for cell in result["cells"]:
        how = cell["method"]
        if rounded:
            how = "refined" if how in QUALITIES else "GPTQ"
            how = how if cell["pattern"] == "dense" else f"{cell['method']}, {how}"
        zeros = f"{cell['zeros']:.1%}" if "zeros" in cell else ""
        zeros += f" | {cell['revived']:.1%}" if rounded else ""
        lines.append(
            f"| {cell['pattern']} | {how} | {cell['tool']} {cell['version']} | {zeros} | {cell['perplexity']:.2f} | "
            f"{cell['excess_loss']:.4f} | {cell['seconds']:.1f} | {cell['peak_memory_bytes'] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines) + "\n"


def known(output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of an earlier run with these settings."""
    if not output.exists():
        return []
    found = json.loads(output.read_text())
    if differing := [name for name, value in settings.items() if name != "date" and found.get(name, 0) != value]:
        raise SystemExit(f"{output} was measured with other {', '.join(differing)}: choose another file")
    return found["cells"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=100, help="evaluation windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to prune in")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *QUALITIES])
    parser.add_argument("--patterns", nargs="+")
    parser.add_argument("--bits", type=int, choices=(0, 4, 8), default=0, help="of codes to round to afterwards; 0 is none")
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "llmprune-peers")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    peer, folder = make_environment(args.environment), resolve(args.model).path
    tokenizer, text = evaluation(folder, args.windows)
    windows = calibration_windows("pydoc", tokenizer, samples=args.samples, seqlen=args.length, seed=0)
    dense = dense_perplexity(folder, args.windows)
    result: dict[str, Any] = {
        "date": date.today().isoformat(), "versions": versions(), "model": args.model, "dense": dense.value,
        "samples": args.samples, "length": args.length, "windows": args.windows, "threads": args.threads, "dtype": args.dtype,
        "bits": args.bits,
    }  # fmt: skip
    methods, patterns = (BITS_METHODS, BITS_PATTERNS) if args.bits else (METHODS, PATTERNS)
    result["cells"] = known(args.output, result)
    done = {(cell["pattern"], cell["method"], cell["tool"]) for cell in result["cells"]}
    with tempfile.TemporaryDirectory() as scratch:
        tokens, saved = Path(scratch) / "tokens.safetensors", Path(scratch) / "model.safetensors"
        save_file({"ids": windows.ids.contiguous()}, tokens)
        for pattern in args.patterns or patterns:
            for method in args.methods or methods:
                for tool, python, code in (("llmprune", Path(sys.executable), _OURS), ("llm-compressor", peer, _THEIRS)):
                    if (pattern, method, tool) in done or (method not in METHODS and code is _THEIRS):
                        continue
                    arguments = [str(folder), str(tokens), method, pattern, str(args.bits), str(GROUP)]
                    arguments += [str(args.threads), args.dtype, str(saved)]
                    cell = {"pattern": pattern, "method": method, "tool": tool, **run(python, code, arguments)}
                    model = load_float32(folder)
                    with torch.no_grad():
                        model.load_state_dict(load_file(saved))
                    zeros, found = same_task(model, tool, pattern, args.bits), perplexity(model, text)
                    cell |= {"zeros": zeros, "perplexity": found.value, "excess_loss": excess_loss(dense, found)}
                    result["cells"].append(cell)
                    args.output.write_text(json.dumps(result, indent=1) + "\n")
                    print(json.dumps(cell), flush=True)
    args.output.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
