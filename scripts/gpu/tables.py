"""Tables of what `gpu_check.py` found, for the documentation."""

from __future__ import annotations

from gpu.rows import Found

SHOWN = (1, 8, 16, 64, 512, 2048)  # tokens


def layers(found: Found) -> str:
    """Microseconds of dense and packed products, by shape and tokens."""
    by_shape: dict[str, dict[int, Found]] = {}
    for row in found["rows"].values():
        if "tokens" in row:
            by_shape.setdefault(f"{row['rows']} x {row['columns']}", {})[row["tokens"]] = row
    lines = [f"| layer | {' | '.join(map(str, SHOWN))} |", f"|---|{'---:|' * len(SHOWN)}"]
    for shape, rows in by_shape.items():
        cells = [cell(rows[tokens]) if tokens in rows else "" for tokens in SHOWN]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    how = f"{found['device']}, torch {found['versions']['torch']}, bfloat16, {found['date']}: us dense / packed, and the ratio"
    return "\n".join(["", *lines, "", f"{how}, by tokens; what is blank there was no time for.", ""])


def cell(row: Found) -> str:
    return f"{1e6 * row['dense']:.1f} / {1e6 * row['packed']:.1f}, {row['speedup']:.2f}x"


def whole(found: Found) -> str:
    """Milliseconds of a whole model, dense and packed."""
    lines = ["| 8B-shaped Llama | dense, ms | packed, ms | speed-up |", "|---|---:|---:|---:|"]
    for key, row in found["rows"].items():
        if "dense" in row:
            what = key.removeprefix("8B, ")
            lines.append(f"| {what} | {1e3 * row['dense']:.2f} | {1e3 * row['packed']:.2f} | {row['speedup']:.2f}x |")
    return "\n".join(["", *lines, "", f"{found['device']}, {found['date']}; random weights.", ""])


def blocks(found: Found) -> str:
    """Seconds a block, memory, and the projection for all blocks."""
    lines = [
        "| blocks, recipe | forward | statistics | solve | fit | write | a block | all blocks, min | GPU memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, row in found["rows"].items():
        if "seconds_a_block" in row:
            phases = [row["seconds"].get(name, 0) for name in ("forward", "statistics", "solve", "reconstruct", "write")]
            own = [f"{seconds:.1f}" for seconds in (*phases, row["seconds_a_block"], row["projected_minutes"])]
            memory = max(of["device"] for of in row["memory"].values() if "device" in of) / 2**30
            lines.append(f"| {key} | {' | '.join(own)} | {memory:.1f} GiB |")
    how = "128 windows of 2048 tokens, random weights; seconds of those blocks, and a projection for 32 (8B) or 80 (70B)"
    return "\n".join(["", *lines, "", f"{found['device']}, {found['date']}; {how}.", ""])
