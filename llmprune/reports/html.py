"""Write a report: the page, and its JSON twin beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmprune.base.errors import InputError, user_path
from llmprune.base.files import file_to_write, write_whole
from llmprune.base.notation import listed
from llmprune.base.words import count
from llmprune.reports.page import MOST, content
from llmprune.reports.saved import read_runs
from llmprune.reports.saved_scan import is_scan, read_scan
from llmprune.reports.scan_page import scan_content


def report(
    runs: str | Path | Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    benches: str | Path | Sequence[str | Path] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a page about a run, several side by side, or a scan, and beside it all that it says as JSON, which is returned.

    Args:
        runs: folders that llmprune wrote, packed or not, or their records; or one that `llmprune scan` wrote.
        output: the page, a name that ends with .html.
        benches: what `llmprune bench --json` wrote of each run, in their order; none: speed is not shown.
        overwrite: replace what is there.

    Raises:
        InputError: a run or bench is damaged, or the page cannot be written; nothing has been.
    """
    names, measured = listed(runs), listed(benches)
    target = file_to_write(str(output))
    if not 0 < len(names) <= MOST:
        raise InputError(f"{count(len(names), 'run')} on one page: name one or more, and at most {MOST} to tell them apart")
    inputs, page = _page(names, measured)
    twin = check_target(target, inputs, overwrite=overwrite)
    write_whole({twin: as_json(page), target: render(page, twin.name)})
    return page


def _page(names: Sequence[str], benches: Sequence[str]) -> tuple[list[Path], dict[str, Any]]:
    """What is read, and all that is said of it."""
    if scans := [name for name in names if is_scan(name)]:
        if len(names) > 1 or benches:
            raise InputError(f"{scans[0]} is a scan, which has a page of its own: name it alone, without --bench")
        scan = read_scan(scans[0])
        return [scan.file], scan_content(scan)
    runs = read_runs(names, benches)
    return [*(one.file for one in runs), *(user_path(name, "bench") for name in benches)], content(runs)


def render(page: dict[str, Any], twin: str) -> str:
    """The page as HTML; `twin` is the name of the file that holds it as data.

    Raises:
        InputError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup

        from llmprune.reports.figures import figures
        from llmprune.reports.scan_figures import scan_figures
    except ImportError as error:
        raise InputError(f"a report needs {error.name}, which is not installed: pip install jinja2 matplotlib") from None
    drawn, name = (figures(page), "runs") if "runs" in page else (scan_figures(page["scan"]), "scan")
    svg = {name: Markup(text) for name, text in drawn.items()}
    loader = jinja2.PackageLoader("llmprune", "reports")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(f"{name}.html.jinja").render(page=page, svg=svg, twin=twin) + "\n"


def check_target(target: Path, inputs: Iterable[Path], *, overwrite: bool) -> Path:
    """Refuse an output that would cost the user something; returns the twin's path.

    Raises:
        InputError: it is no name of a page, or is there already.
    """
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"output {target} is no page's name: end it with .html")
    twin = target.with_suffix(".json")
    for path in (target, twin):
        if path.resolve() in {one.resolve() for one in inputs}:
            raise InputError(f"output {path} is what the report is made from: choose another with --output")
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is no ordinary file")
        if path.exists() and not overwrite:
            raise InputError(f"output {path} is there already: choose another with --output, or pass --overwrite to replace it")
    return twin


def as_json(page: dict[str, Any]) -> str:
    return json.dumps(page, separators=(",", ":")) + "\n"
