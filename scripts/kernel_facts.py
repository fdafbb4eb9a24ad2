"""What the compiled decode kernel is made of, found without a GPU: instructions, registers, shared memory, programs and waves.

    python scripts/kernel_facts.py --output eval/results/kernel_facts.json    # adds this Triton's facts to the file's, writes a .md

Compiles for sm_80 and sm_90 with the compiler that comes with Triton, and reads its assembly. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmprune.formats.kernels import decode, decompress
from llmprune.formats.kernels.plan import SETTINGS, Settings, plan, shared_memory

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DEVICES = {80: (108, 164), 90: (132, 228)}  # multiprocessors (A100, H100), KiB of shared memory of one
LLAMA_8B = ((14336, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (28672, 4096))
REGISTERS, WARPS = 65536, 64  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory a program has besides its own
TYPES = {
    "values_ptr": "*i32", "meta_ptr": "*i32", "partial_ptr": "*fp32", "arrived_ptr": "*i32",
    "M": "i32", "N": "i32", "K": "i32", "chunks": "i32", "each": "i32",
}  # fmt: skip


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, warps: int, stages: int) -> Any:
    """A kernel as Triton compiles it for a device of such capability."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [i for i, (name, type_) in enumerate(signature.items()) if type_.startswith("*") or name == "K"]
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


def launches(capability: int, tokens: int, words: int = 16) -> list[dict[str, Any]]:
    """The grid for each of an 8B Llama's layers."""
    found = []
    processors, shared = DEVICES[capability]
    for rows, columns in LLAMA_8B:
        own = plan(rows, columns // (32 * words), words, tokens, processors, (shared - 1) * 1024)
        found.append({"rows": rows, "columns": columns, "programs": own.programs, "chunks_each": own.each})
    return found
