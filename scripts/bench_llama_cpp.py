"""Packed models beside llama.cpp on this CPU: the random Llama of bench_cpu.py, decoded and prefilled.

    pip install llama-cpp-python gguf
    python scripts/bench_llama_cpp.py --output eval/results/llama_cpp.json [--threads 1 2]

Each side is a process of its own, so that no two pools of threads meet, and all take turns: 8 tokens decoded one by one over a
cache of 32, then a prompt of 512, of which the last logits are computed. llama.cpp gets the same shapes as a GGUF file of
random weights, in BF16 and as its own quantiser writes Q8_0 and Q4_0; the embedding is the head in all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_cpu import CACHED, KINDS, PROMPT, STEPS, Decoder, Row, config, model_of

from llmprune.base.hardware import processor_name
from llmprune.formats.kernels import native
from llmprune.job.record import versions

FILES = ("BF16", "Q8_0", "Q4_0")
DENSE = "dense bfloat16"
SIDES = (DENSE, *KINDS, *(f"llama.cpp {name}" for name in FILES))
TURNS = 5
Turn = tuple[Callable[[], Any], Callable[[], Any]]  # decode STEPS tokens; prefill PROMPT of them


def write_gguf(path: Path) -> None:
    """The model in BF16, without a vocabulary."""
    import gguf

    shape = config()
    heads, width = shape.num_key_value_heads or shape.num_attention_heads, shape.head_dim or 0
    kind = gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    hidden, kv = shape.hidden_size, heads * width
    matrices = {
        "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (shape.intermediate_size, hidden), "ffn_up": (shape.intermediate_size, hidden),
        "ffn_down": (hidden, shape.intermediate_size),
    }  # fmt: skip

    def matrix(name: str, rows: int, columns: int) -> None:
        values = (0.02 * torch.randn(rows, columns)).bfloat16().view(torch.uint8).numpy()
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", torch.ones(hidden).numpy())

    matrix("token_embd", shape.vocab_size, hidden)
    norm("output_norm")
    for block in range(shape.num_hidden_layers):
        for name, (rows, columns) in matrices.items():
            matrix(f"blk.{block}.{name}", rows, columns)
        norm(f"blk.{block}.attn_norm")
        norm(f"blk.{block}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_files(folder: Path) -> None:
    """A GGUF file for each of FILES."""
    import llama_cpp

    write_gguf(folder / "BF16.gguf")
    for name in FILES[1:]:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        paths = [str(folder / f"{one}.gguf").encode() for one in ("BF16", name)]
        failed = llama_cpp.llama_model_quantize(*paths, params)
        if failed:
            raise SystemExit(f"llama.cpp could not write {name}.gguf")


def llama_cpp_side(path: Path, threads: int) -> Turn:
    """llama.cpp on a file."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 2 * PROMPT, PROMPT, PROMPT
    params.n_threads, params.n_threads_batch = threads, threads
    context = llama_cpp.llama_init_from_model(model, params)
    memory = llama_cpp.llama_get_memory(context)
    tokens = (llama_cpp.llama_token * PROMPT)(*torch.randint(1000, (PROMPT,)).tolist())

    def run(count: int) -> None:
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)):
            raise SystemExit("llama.cpp failed to decode")

    def clear(count: int) -> None:
        llama_cpp.llama_memory_clear(memory, True)
        if count:
            run(count)

    def decode() -> None:
        for _ in range(STEPS):
            run(1)
            logits = llama_cpp.llama_get_logits_ith(context, -1)
            tokens[0] = max(range(10), key=logits.__getitem__)  # read, so that nothing is put off
        llama_cpp.llama_memory_seq_rm(memory, 0, CACHED, -1)

    def prefill() -> None:
        llama_cpp.llama_memory_seq_rm(memory, 0, 0, -1)
        run(PROMPT)
        llama_cpp.llama_memory_seq_rm(memory, 0, CACHED, -1)

    clear(CACHED)
    return decode, prefill


def own_side(kind: str, threads: int) -> Turn:
    """The dense model in torch, or a packed one."""
    torch.set_num_threads(threads)
    model = model_of(kind)
    prompt = torch.randint(1000, (1, PROMPT))
    return Decoder(model), partial(model, input_ids=prompt, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def serve(side: str, threads: int, folder: Path) -> None:
    """For each line read: run a turn, and print its two times in seconds. The first line printed says that it is ready."""
    name = side.removeprefix("llama.cpp ")
    turn = llama_cpp_side(folder / f"{name}.gguf", threads) if name in FILES else own_side(side, threads)
    for call in turn:
        call()
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = []
        for call in turn:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


@contextlib.contextmanager
def started(side: str, threads: int, folder: Path) -> Iterator[Callable[[], list[float]]]:
    """A side in its process; calling it runs a turn."""
    command = [sys.executable, __file__, "--serve", side, "--threads", str(threads), "--files", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        to, told = process.stdin, process.stdout
        assert to is not None
        assert told is not None
        if told.readline().strip() != "ready":
            raise SystemExit(f"{side} did not start")

        def turn() -> list[float]:
            to.write("\n")
            to.flush()
            found: list[float] = json.loads(told.readline())
            return found

        yield turn
        to.close()


def measure(threads: int, folder: Path) -> Row:
    """Tokens a second of each side, decoded and prefilled: the best of the turns."""
    with ExitStack() as stack:
        sides = {side: stack.enter_context(started(side, threads, folder)) for side in SIDES}
        turns = [{side: turn() for side, turn in sides.items()} for _ in range(TURNS)]
    row: Row = {"threads": threads, "decode": {}, "prefill": {}}
    for side in SIDES:
        decode, prefill = (min(turn[side][phase] for turn in turns) for phase in (0, 1))
        row["decode"][side], row["prefill"][side] = STEPS / decode, PROMPT / prefill
        print(f"{threads} threads, {side}: decode {STEPS / decode:.1f}, prefill {PROMPT / prefill:.0f} tokens/s", flush=True)
    return row


def page(result: Row) -> str:
    made = result["versions"]
    return "\n".join(
        [
            "# Packed models and llama.cpp on a CPU",
            "",
            f"Written by `scripts/bench_llama_cpp.py`. {result['device']}, {result['date']}, torch {made['torch']}, "
            f"llama-cpp-python {made['llama-cpp-python']}, compiled by {result['built']}.",
            "",
            table(result),
        ]
    )


def table(result: Row) -> str:
    """Tokens a second: a row for each side."""
    counts = [row["threads"] for row in result["rows"]]
    heads = [f"{phase}, {count} thread{'s' * (count > 1)}" for phase in ("decode", "prefill of 512") for count in counts]
    lines = [f"| 1.1B Llama, tokens/s | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for side in SIDES:
        cells = [f"{row['decode'][side]:.1f}" for row in result["rows"]]
        cells += [f"{row['prefill'][side]:.0f}" for row in result["rows"]]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--built", default="its own choice of compiler and flags", help="how llama.cpp was built, for the page")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        serve(args.serve, args.threads[0], args.files)
        return
    if args.output is None:
        parser.error("--output is required")
    with tempfile.TemporaryDirectory() as scratch:
        write_files(Path(scratch))
        rows = [measure(count, Path(scratch)) for count in args.threads]
    result: Row = {
        "date": date.today().isoformat(),
        "device": processor_name(torch.device("cpu")),
        "level": native.level(),
        "built": args.built,
    }
    result |= {"versions": versions() | {"llama-cpp-python": version("llama-cpp-python")}, "rows": rows}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(page(result))


if __name__ == "__main__":
    main()
