"""Write the documentation's numbers from eval/results; with --check, say whether they are up to date.

    python scripts/docs_numbers.py [--check]

A region of README.md or of a page in docs/ begins with `<!-- NAME -->`, ends with `<!-- /NAME -->` and holds what the function
of that name below makes of the JSON files; so each number has one source, wherever it stands. Beside the JSON files the tables
methods.md, structured.md, peers.md, allocation.md, budgets.md, recovery.md, tickets.md, quantise.md, cpu.md, llama_cpp.md
and past.md and the plots methods.svg and quantise.svg are written.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import bench_budgets
import bench_cpu
import bench_llama_cpp
import bench_quantise
import bench_recovery
import compare_allocation
import compare_past
import compare_tickets
from compare_dtypes import table as dtypes_table
from compare_peers import share
from compare_peers import table as peers_table
from compare_structured import table as structured_table
from gpu import tables as gpu_tables
from profile_run import batches_table, bound_table, bytes_text, runs_table

from llmprune.base.words import size
from llmprune.reports import sizes, sizes_plot
from llmprune.reports.comparison import by_model, listing, tables
from llmprune.reports.comparison_plot import plot

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results"
PRESETS = ("fast", "balanced", "best")
SOLD = ("2:4", "60%")  # the patterns of the README's table
SHOWN = {"activation", "magnitude", "output", "second_order", "influence", "loss"}  # scores in docs/; all are in the .md
REGION = re.compile(r"<!-- (?P<name>[a-z-]+) -->\n(?P<text>.*?)<!-- /(?P=name) -->", re.DOTALL)


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def dates(cells: Iterable[dict[str, Any]]) -> str:
    """The day, or the first and the last."""
    days = sorted({cell["date"] for cell in cells})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def job_how(job: dict[str, Any]) -> str:
    """What the main job's seconds depend on."""
    machine = job["machine"]
    return f"{machine['threads']} CPU cores, {job['date']}, the machine's load {machine['load_before']:.1f} before it began"


def quick_start() -> str:
    """What the main job prints, without the blocks between the first and the last and the seconds of each phase."""
    job = read("bench_prune")["job"]
    lines: list[str] = []
    printed = job["printed"].rstrip().splitlines()
    last = max(i for i, line in enumerate(printed) if line.startswith("block "))
    for i, line in enumerate(printed):
        if line.startswith("block ") and not line.startswith("block 1/") and i != last:
            if lines[-1] != "...":
                lines.append("...")
        elif not line.startswith("│ seconds: "):
            lines.append(line)
    left_out = "the other blocks and the seconds of each phase are left out"
    how = f"The first line prints, in {job['wall_seconds']:.0f} s ({job_how(job)}; {left_out}):"
    return "\n".join([how, "", "```text", *lines, "```", ""])


def selling() -> str:
    """Methods and presets on the bundled model, and llm-compressor beside."""
    cells, peers = read("methods")["cells"], read("peers")
    own = by_model(cells)["llama"]
    patterns = [pattern for pattern in SOLD if any(p == pattern for _, p in own)]
    lost = {method: draws.mean("excess_loss") for (method, pattern), draws in own.items() if pattern == "2:4"}
    order = sorted(lost, key=lambda method: (method in PRESETS, -lost[method]))
    beside = {(c["tool"], c["method"], c["pattern"]): c for c in peers["cells"]}
    lines = [
        f"| method | {' | '.join(f'excess loss, {p}' for p in patterns)} | seconds, 2:4 | side by side: seconds, 2:4 |",
        f"|---|{'---:|' * (len(patterns) + 2)}",
    ]
    for method in order:
        losses = [own[method, p].shown("excess_loss", ".4f") if (method, p) in own else "" for p in patterns]
        twin = beside.get(("llmprune", method, "2:4"))
        name = f"**`{method}`**" if method in PRESETS else f"`{method}`"
        row = [name, *losses, f"{own[method, '2:4'].mean('seconds'):.0f}", f"{twin['seconds']:.0f}" if twin else ""]
        lines.append(f"| {' | '.join(row)} |")
    for method, title in {"wanda": "Wanda", "sparsegpt": "SparseGPT"}.items():
        found = [beside.get(("llm-compressor", method, p)) for p in patterns]
        losses = [f"{cell['excess_loss']:.4f}" if cell else "" for cell in found]
        if found[0]:
            name = f"llm-compressor {found[0]['version']}, {title}"
            lines.append(f"| {' | '.join([name, *losses, '', str(round(found[0]['seconds']))])} |")
    return "\n".join(["", *lines, "", *_sold_how(own, peers, cells), ""])


def _sold_how(own: Any, peers: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    dense, shown = own["fast", "2:4"].mean("dense"), [c for c in cells if c["sparsity"] in SOLD and c["model"] == "llama"]
    return [
        f"Excess loss in nats a token, ln(perplexity / dense perplexity of {dense:.2f}), on held-out text: mean ± standard",
        f"deviation of three calibration draws ({dates(shown)}). Float32, one CPU thread; seconds are the pruning's own.",
        f"The llm-compressor rows and the last column are another measurement ({peers['date']}): both tools, turn about, on",
        "the same tokens of one draw ([its losses of both](docs/methods.md#beside-llm-compressor))."
        f"{_rounded(peers)} Only seconds of the same column compare.",
    ]


def _rounded(peers: dict[str, Any]) -> str:
    """Which cells of llm-compressor's hold fewer zeros than were asked for."""
    cells = [c for c in peers["cells"] if c["pattern"] in SOLD and "zeros" in c and c["zeros"] < share(c["pattern"]) - 1e-3]
    return "".join(f" Of its {c['method']} at {c['pattern']}, {c['zeros']:.1%} are zeros." for c in cells)


def methods() -> str:
    cells = read("methods")["cells"]
    return f"{tables(cells)}\n{_spread_of(cells)}\n\n{ratios()}\n"


def _spread_of(cells: list[dict[str, Any]]) -> str:
    draws = len({cell["seed"] for cell in cells})
    return f"Mean and standard deviation of {draws} calibration draws, {dates(cells)}."


def ratios() -> str:
    """How much of another method's loss the presets lose, over all that was measured of both models."""
    own = by_model(read("methods")["cells"])
    patterns = [
        p for p in ("2:4", "50%", "60%", "70%") if all(("best", p) in o and ("sparsegpt", p) in o for o in own.values())
    ]

    def span(method: str, other: str) -> str:
        found = [o[method, p].mean("excess_loss") / o[other, p].mean("excess_loss") for o in own.values() for p in patterns]
        return f"{min(found):.2f} to {max(found):.2f}"

    return (
        f"On both models at {', '.join(patterns[:-1])} and {patterns[-1]}, `fast` loses {span('fast', 'sparsegpt')} of what "
        f"SparseGPT loses,\n`balanced` {span('balanced', 'sparsegpt')}, and `best` {span('best', 'alps')} of what ALPS loses."
    )


def peers() -> str:
    """The rows of peers.md and their circumstances."""
    lines = peers_table(read("peers")).splitlines()
    return "\n".join(lines[4:]) + "\n\n" + lines[2].removeprefix("Written by `scripts/compare_peers.py`. ") + "\n"


def peers_wide() -> str:
    """Seconds on a wider model in two dtypes; it is hardly trained, so losses are left out."""
    lines = [
        "| dtype | method | tool | seconds | of llm-compressor's SparseGPT | peak memory |",
        "|---|---|---|---:|---:|---:|",
    ]
    for dtype in ("float32", "bfloat16"):
        found = read(f"peers_wide_{dtype}")
        (theirs,) = (cell["seconds"] for cell in found["cells"] if cell["tool"] == "llm-compressor")
        for cell in sorted(found["cells"], key=lambda cell: cell["seconds"]):
            row = [dtype, cell["method"], f"{cell['tool']} {cell['version']}", f"{cell['seconds']:.1f}"]
            row += [f"{cell['seconds'] / theirs:.2f}x", size(cell["peak_memory_bytes"])]
            lines.append(f"| {' | '.join(row)} |")
    of = f"{found['samples']} windows of {found['length']} tokens, {found['threads']} threads"
    how = f"2:4, {of}, {found['date']}; one run each."
    return "\n".join(["", *lines, "", how, ""])


def structured() -> str:
    return structured_table([row for row in read("structured")["rows"] if row["score"] in SHOWN])


def structured_speed() -> str:
    found = read("bench_structured")
    lines = ["| fewer heads and neurons | prefill | decode | by multiplications |", "|---|---:|---:|---:|"]
    for row in found["rows"]:
        if row["removed"]:
            speeds = [f"{row[what]['times_dense']:.2f}x" for what in ("prefill", "decode")]
            lines.append(f"| {row['removed']:.0%} | {' | '.join(speeds)} | {row['ideal']:.2f}x |")
    millions = found["rows"][0]["parameters"] / 1e6
    how = f"A random Llama of {millions:.0f}M parameters, float32, {found['machine']['threads']} CPU cores, {found['date']}."
    return "\n".join(["", *lines, "", how, ""])


def measured() -> str:
    """Time and memory, a row a measurement."""
    rows = [_job(), *_solvers(), _depths(), _blocks(), _processes()]
    return "\n".join(["", "| what, on a CPU | measured |", "|---|---|", *(f"| {what} | {found} |" for what, found in rows), ""])


def _job() -> tuple[str, str]:
    job = read("bench_prune")["job"]
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in job["seconds"].items() if seconds >= 1)
    return (
        f"`llmprune --model llama --sparsity 2:4` (`balanced`), whole process with start-up; {job_how(job)}",
        f"{job['wall_seconds']:.0f} s: {phases}; peak {size(job['peak_memory_bytes'])}",
    )


def _solvers() -> list[tuple[str, str]]:
    found, rows = read("bench_solvers"), []
    for solver in ("sparsegpt", "alps", "refit"):
        own = [row for row in found["rows"] if row["solver"] == solver and "plain_seconds" in row]
        squares = [r for side in (1024, 2048) for r in own if r["shape"] == [side, side] and r["pattern"] == "2:4"]
        times = ", ".join(f"{r['seconds']:.2f} s against {r['plain_seconds']:.2f}" for r in squares)
        ratio, same = [row["ratio"] for row in own], max(abs(r["error"] / r["plain_error"] - 1) for r in own)
        what = (
            f"`{solver}` against a plain twin: 1024x1024, 2048x2048 to 2:4; 512 to 2048 wide, square and 1:3.5, 2:4 and 50%; "
            f"{found['threads']} cores, {found['date']}"
        )
        rows.append((what, f"{times}; {min(ratio):.1f} to {max(ratio):.1f}x, output errors equal to {same:.0e}"))
    return rows


def _depths() -> tuple[str, str]:
    found = read("bench_prune")["memory"]
    peaks = [
        f"{row['blocks']} blocks ({size(row['checkpoint_bytes'])}): {', '.join(size(peak) for peak in row['peaks_bytes'])}"
        for row in found["rows"]
    ]
    return f"streaming a synthetic checkpoint, peak memory of the process, three times each; {found['date']}", "; ".join(peaks)


def _blocks() -> tuple[str, str]:
    found = read("bench_memory")
    seconds, tenth = found["seconds_by_block"], found["blocks"] // 10
    first, last = (median(part) for part in (seconds[:tenth], seconds[-tenth:]))
    what = (
        f"streaming {found['blocks']} blocks of width {found['hidden']} ({size(found['checkpoint_bytes'])}) through Wanda: "
        "peak memory beyond that of a process that has imported llmprune; seconds a block, median of the first and of the last "
        f"tenth; one core, {found['date']}"
    )
    return what, f"{size(found['peak_bytes'] - found['loaded_bytes'])}; {first:.1f} and {last:.1f}"


def _processes() -> tuple[str, str]:
    found = read("bench_prune")["processes"]
    parts = ([f"{row[f'{part}_seconds']:.1f}" for row in found["rows"]] for part in ("collect", "solve"))
    what = (
        "one process and two, one thread each, `fast` to 2:4 on 2 blocks of width 1024: seconds of running and counting, and "
        f"of solving; {found['date']}"
    )
    return what, "; ".join(" and ".join(part) for part in parts)


REGIONS: dict[str, Callable[[], str]] = {
    "quick-start": quick_start,
    "selling": selling,
    "methods": methods,
    "peers": peers,
    "peers-wide": peers_wide,
    "structured": structured,
    "structured-speed": structured_speed,
    "measured": measured,
    "profile-runs": lambda: runs_table(read("profile")),
    "profile-bound": lambda: bound_table(read("profile")),
    "profile-bytes": lambda: bytes_text(read("profile")),
    "profile-batches": lambda: batches_table(read("profile")),
    "allocation": lambda: compare_allocation.measured(read("allocation")),
    "budgets": lambda: bench_budgets.measured(read("budgets")),
    "tickets": lambda: compare_tickets.measured(read("tickets")),
    "recovery": lambda: bench_recovery.measured(read("recovery")),
    "quantise": lambda: sizes.markdown(read("quantise")["cells"]),
    "quantise-layers": lambda: bench_quantise.table(read("quantise_layers")),
    "quantise-peers": lambda: "\n".join(peers_table(read("peers_bits")).splitlines()[4:]) + "\n",
    "cpu": lambda: bench_cpu.summary(read("cpu")),
    "past": lambda: compare_past.measured(read("past")),
    "past-training": lambda: compare_past.trained(read("past")),
    "llama-cpp": lambda: bench_llama_cpp.table(read("llama_cpp")),
    "dtypes": lambda: dtypes_table(read("dtypes")),
    "gpu-layers": lambda: gpu_tables.layers(read("gpu_layers")),
    "gpu-whole": lambda: gpu_tables.whole(read("gpu_e2e")),
    "gpu-blocks": lambda: gpu_tables.blocks(read("gpu_prune")),
}


def filled(text: str, name: str) -> str:
    """A page with its regions written anew."""
    for mark in re.findall(r"<!-- /([a-z-]+) -->", text):
        if mark not in REGIONS:
            raise SystemExit(f"{name} has a region {mark}: {', '.join(REGIONS)} are known")

    def written(region: re.Match[str]) -> str:
        return f"<!-- {region['name']} -->\n{REGIONS[region['name']]()}<!-- /{region['name']} -->"

    return REGION.sub(written, text)


def pages() -> dict[Path, str]:
    """All files that hold numbers, as they should be."""
    texts = {RESULTS / "methods.md": listing(read("methods")["cells"]), RESULTS / "peers.md": peers_table(read("peers"))}
    texts[RESULTS / "structured.md"] = structured_table(read("structured")["rows"])
    texts[RESULTS / "allocation.md"] = compare_allocation.page(read("allocation"))
    texts[RESULTS / "budgets.md"] = bench_budgets.page(read("budgets"))
    texts[RESULTS / "tickets.md"] = compare_tickets.page(read("tickets"))
    texts[RESULTS / "quantise.md"] = sizes.listing(read("quantise")["cells"])
    texts[RESULTS / "cpu.md"] = bench_cpu.page(read("cpu"))
    texts[RESULTS / "past.md"] = compare_past.page(read("past"))
    texts[RESULTS / "llama_cpp.md"] = bench_llama_cpp.page(read("llama_cpp"))
    texts[RESULTS / "recovery.md"] = bench_recovery.page(read("recovery"))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        texts[page] = filled(page.read_text(encoding="utf-8"), page.name)
    everywhere = "".join(texts.values())
    if unused := [name for name in REGIONS if f"<!-- /{name} -->" not in everywhere]:
        raise SystemExit(f"no page has a region {', '.join(unused)}")
    return texts


def stale() -> list[str]:
    """The files that this script would change."""
    return [str(file.relative_to(ROOT)) for file, text in pages().items() if file.read_text(encoding="utf-8") != text]


def main() -> int:
    if "--check" in sys.argv:
        old = stale()
        print(f"{', '.join(old)}: not what scripts/docs_numbers.py writes, run it" if old else "up to date")
        return int(bool(old))
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
    plot(read("methods")["cells"], RESULTS / "methods.svg")
    sizes_plot.plot(read("quantise")["cells"], RESULTS / "quantise.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
