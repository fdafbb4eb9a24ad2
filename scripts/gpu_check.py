"""Everything that needs a GPU, in pieces: each goes on where it stopped, and one failure costs one row.

    python scripts/gpu_check.py --plan                                  # the rows of each piece, in order
    python scripts/gpu_check.py --only checks sweep --output eval/results
    TRITON_INTERPRET=1 python scripts/gpu_check.py --small --output FOLDER   # all of it on a CPU, to prove the script

Each piece writes `gpu_PIECE.json` with the device and the versions; a whole `sweep` on a GPU also writes the table of kernel
settings by shape, `by_shape.json`. Numbers are of random weights of the shapes of Llamas, but
for the runs of the bundled model. It needs no installation: `PYTHONPATH=.` is enough. Exit code 1: a row failed or is wrong;
3: the device no longer answers this process, and the same command goes on behind the row that did it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from gpu import checks, e2e, layers, prune, solvers, sweep
from gpu.rows import DeviceLost, Results, Row, failed
from gpu.shapes import Place

from llmprune.base.words import count
from llmprune.formats.kernels import plan
from llmprune.job.record import versions

PIECES: dict[str, Callable[[Place], list[Row]]] = {
    "checks": checks.rows,
    "sweep": sweep.rows,
    "layers": layers.rows,
    "e2e": e2e.rows,
    "solvers": solvers.rows,
    "prune": prune.rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES), help="pieces, in this order (default: all)")
    parser.add_argument("--plan", action="store_true", help="print what would be measured, and measure nothing")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so many")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, kernels in Triton's interpreter")
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    place = Place(torch.device("cpu" if args.small else "cuda"), args.small)
    if args.plan:
        for piece in args.only:
            print(piece, *(f"  {row.key}" for row in PIECES[piece](place)), sep="\n")
        return 0
    if place.fast and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --small proves the script on a CPU, --plan lists the rows")
    name = torch.cuda.get_device_name(place.device) if place.fast else "cpu, interpreted"
    header = {"date": date.today().isoformat(), "device": name, "versions": versions()}
    end, bad = time.monotonic() + args.seconds, 0
    for piece in args.only:
        start = time.monotonic()
        results = Results(args.output / f"gpu_{piece}.json", header, place.device, end=end, retry=args.retry)
        try:
            with torch.no_grad():
                results.measure(PIECES[piece](place))
        except DeviceLost as error:
            print(f"{piece}: the device no longer answers ({error}): run the same command again", file=sys.stderr)
            return 3
        if piece == "sweep" and place.fast and not results.left:
            plan.write(sweep.better(results.rows))
        wrong = [key for key, row in results.rows.items() if failed(row)]
        bad += len(wrong)
        left = f", {len(results.left)} left for want of time" if results.left else ""
        print(
            f"{piece}: {count(len(results.rows), 'row')} in {time.monotonic() - start:.0f} s, {len(wrong)} failed{left}",
            flush=True,
        )
        for key in wrong:
            print(f"  FAILED {key}: {results.rows[key].get('raised', results.rows[key])}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
