"""What the compiled decode kernel is made of, found without a GPU: instructions, registers, shared memory, programs and waves.

    python scripts/kernel_facts.py --output eval/results/kernel_facts.json

Adds the facts of the Triton it runs under to those of others in the file, and writes the same as Markdown beside it.

Compiles for sm_80 and sm_90 with the compiler that comes with Triton, and reads its assembly. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmprune.formats.kernels import decode, decompress
from llmprune.formats.kernels.plan import SETTINGS, Settings, choose, plan, shared_memory

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DEVICES = {80: (108, 164), 90: (132, 228)}  # multiprocessors (A100, H100), KiB of shared memory of one
LLAMA_8B = ((14336, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (28672, 4096))
REGISTERS, WARPS = 65536, 64  # of a multiprocessor
MOST_INSTRUCTIONS = 660  # a thread, a chunk, for 8 tokens
LEAST = {("sm_80", 64): 1}  # programs a multiprocessor, where not 2
RESERVED = 1024  # bytes of shared memory a program has besides its own
TYPES = {
    "values_ptr": "*i32", "meta_ptr": "*i32", "partial_ptr": "*fp32", "arrived_ptr": "*i32",
    "M": "i32", "N": "i32", "K": "i32", "chunks": "i32", "each": "i32",
}  # fmt: skip


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int, stages: int) -> Any:
    """A kernel as Triton compiles it for a device of such capability."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, (name, type_) in enumerate(signature.items()) if type_.startswith("*") or name in ("K", "groups")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


def facts(settings: Settings, tokens: int, capability: int, *, words: int = 16, kind: str = "bf16") -> dict[str, Any]:
    """Of the decode kernel; `tokens` are padded ones."""
    types = TYPES | dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), f"*{kind}")
    constants = {
        "ROWS": settings.rows, "WORDS": words, "TOKENS": tokens, "JOINED": settings.joined, "BIAS": True, "FAST": True,
    }  # fmt: skip
    built = compiled(decode._decode, types, constants, capability, settings.warps, settings.stages)
    registers, spilled, assembly = _resources(built)
    shared, most = built.metadata.shared, DEVICES[capability][1] * 1024
    own = -(-registers // 8) * 8 * 32 * settings.warps
    waits = [int(number) for number in re.findall(r"async_wait.*?num = ([0-9]+)", built.asm["ttgir"])]
    return {
        "instructions_a_chunk": _in_main_loop(assembly),
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "asked": shared_memory(settings, words, tokens),
        "programs": min(REGISTERS // own, most // (shared + RESERVED), WARPS // settings.warps),
        "in_flight": max(waits, default=0) > 0,  # copies that a wait leaves under way
    }


def decompress_facts(capability: int) -> dict[str, Any]:
    types = {"values_ptr": "*i32", "meta_ptr": "*i32", "out_ptr": "*i32", "N": "i32", "total": "i32", "chunks": "i32"}
    constants = {"ROWS": decompress._ROWS, "WORDS": 16, "FAST": True}
    registers, spilled, _ = _resources(compiled(decompress._decompress, types, constants, capability, 4, 1))
    return {"registers": registers, "spilled": spilled}


def _resources(built: Any) -> tuple[int, int, str]:
    """Registers a thread, bytes of them spilled, assembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        used = dict(re.findall(r"(STACK|LOCAL|REG):([0-9]+)", _tool("cuobjdump", "-res-usage", file.name)))
        return int(used["REG"]), int(used["LOCAL"]) + int(used["STACK"]), _tool("nvdisasm", file.name)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def _in_main_loop(assembly: str) -> int:
    """Instructions of the shortest loop that multiplies on tensor cores."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L\w*):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);?\s*(?:/\*|$)", line):
            lines.append(found[1])
    loops = []
    for end, text in enumerate(lines):
        target = re.search(r"\bBRA\b.*?(\.L\w*)", text)
        start = labels.get(target[1], end) if target else end
        if start < end and any("MMA" in own for own in lines[start:end]):
            loops.append(end + 1 - start)
    return min(loops)


def compile_all() -> dict[str, Any]:
    """For each device what the kernel is for each number of tokens, with the settings it has there, and its launches."""
    found: dict[str, Any] = {}
    for capability, (processors, kib) in DEVICES.items():
        shared = kib * 1024 - RESERVED
        kernels = []
        for tokens in SETTINGS:
            own = choose(4096, 8, 16, tokens, shared)
            kernels.append({"tokens": tokens, **asdict(own), **facts(own, tokens, capability)})
        grids = [launch(rows, columns, tokens, processors, shared) for rows, columns in LLAMA_8B for tokens in SETTINGS]
        found[f"sm_{capability}"] = {"kernels": kernels, "launches": grids, "decompress": decompress_facts(capability)}
    return found


def launch(rows: int, columns: int, tokens: int, processors: int, shared: int) -> dict[str, Any]:
    """How a layer's tiles are dealt out; `balance` is the part of the programs' time in which all have work."""
    own = plan(rows, columns // 512, 16, tokens, processors, shared)
    balance = own.blocks * (columns // 512) / (own.each * own.settings.waves * processors)
    return {
        "rows": rows, "columns": columns, "tokens": tokens, "programs": own.programs, "a_multiprocessor": own.settings.waves,
        "tiles_each": own.each, "balance": round(balance, 3),
    }  # fmt: skip


def broken(found: dict[str, Any]) -> list[str]:
    """The bounds that do not hold."""
    wrong = []
    for device, own in found.items():
        for row in own["kernels"]:
            name = f"{device}, {row['tokens']} tokens"
            if row["spilled"]:
                wrong.append(f"{name}: {row['spilled']} bytes spilled")
            if row["programs"] < LEAST.get((device, row["tokens"]), 2):
                wrong.append(f"{name}: {row['programs']} programs a multiprocessor")
            if row["tokens"] == 8 and row["instructions_a_chunk"] > MOST_INSTRUCTIONS:
                wrong.append(f"{name}: {row['instructions_a_chunk']} instructions a chunk")
            if row["shared"] > row["asked"]:
                wrong.append(f"{name}: {row['shared']} bytes of shared memory, planned with {row['asked']}")
    return wrong


def text(known: dict[str, Any]) -> str:
    """The file in Markdown."""
    lines = [
        "# What the compiled decode kernel is made of",
        "",
        "By `scripts/kernel_facts.py`, without a GPU: nothing here is a time. A tile is so many rows of a chunk, 512 columns.",
        "Programs are those that fit on a multiprocessor; in flight: copies that go on while a tile is multiplied.",
        "",
    ]
    for version, devices in known.items():
        for device, own in devices.items():
            lines += [f"## Triton {version}, {device}", ""]
            head = ["tokens", "rows", "warps", "stages", "instructions a chunk", "registers", "spilled", "programs"]
            lines += _head([*head, "shared KiB", "in flight"])
            for row in own["kernels"]:
                cells = [row[name.replace(" ", "_")] for name in head]
                cells += [row["shared"] // 1024, "yes" if row["in_flight"] else "no"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
            lines.append("")
    lines += ["## Grids, of one wave each", ""]
    for device, own in next(iter(known.values())).items():
        lines += _head([device, "tokens", "programs", "a multiprocessor", "tiles each", "balance"])
        for row in own["launches"]:
            cells = [row["tokens"], row["programs"], row["a_multiprocessor"], row["tiles_each"], f"{row['balance']:.0%}"]
            lines.append(f"| {row['rows']} x {row['columns']} | {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def _head(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    path = parser.parse_args().output
    found = compile_all()
    known = json.loads(path.read_text()) if path.is_file() else {}
    known = dict(sorted((known | {triton.__version__: found}).items()))
    path.write_text(json.dumps(known, indent=1) + "\n")
    path.with_suffix(".md").write_text(text(known))
    for line in (wrong := broken(found)):
        print("WRONG", line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
