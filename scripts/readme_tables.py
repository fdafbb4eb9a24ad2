"""Write the README's tables from eval/results, between their marks; with --check, say whether they are up to date.

python scripts/readme_tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from compare_structured import table as structured_table

from llmprune.reports.comparison import listing, tables
from llmprune.reports.comparison_plot import plot

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results"
SHOWN = {"activation", "magnitude", "output", "second_order", "influence", "loss"}  # scores in the README; all are in the .md


def generated() -> dict[str, str]:
    """The text between each pair of marks, by their name."""
    methods = json.loads((RESULTS / "methods.json").read_text())["cells"]
    structured = json.loads((RESULTS / "structured.json").read_text())["rows"]
    return {
        "methods": tables(methods),
        "structured": structured_table([row for row in structured if row["score"] in SHOWN]),
    }


def filled(text: str) -> str:
    """The README with its tables written anew."""
    for name, table in generated().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if len(places := re.findall(f"{begin}.*?{end}", text, flags=re.DOTALL)) != 1:
            raise SystemExit(f"README.md has {len(places)} places for {name}, not one")
        text = text.replace(places[0], f"{begin}{table}{end}")
    return text


def main() -> int:
    readme = ROOT / "README.md"
    now, new = readme.read_text(encoding="utf-8"), filled(readme.read_text(encoding="utf-8"))
    if "--check" in sys.argv:
        print("up to date" if now == new else "README.md is not what scripts/readme_tables.py writes: run it")
        return int(now != new)
    cells = json.loads((RESULTS / "methods.json").read_text())["cells"]
    (RESULTS / "methods.md").write_text(listing(cells), encoding="utf-8")
    plot(cells, RESULTS / "methods.svg")
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
