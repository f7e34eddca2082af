"""The performance suite: training steps, forwards in eval, memory, floors and overhead of all algorithms.

    python benchmarks/suite.py [--budget 25]             # everything, and the pages
    python benchmarks/suite.py --layers block --rows LoRA --precision bf16 [--mode compiled] [--json FILE]
    python benchmarks/suite.py --pages                   # only the pages, from benchmarks/results/performance.json
    python benchmarks/suite.py --gate [--record]         # a few rows against recorded ratios

With a selection nothing is written but `--json`. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import overhead
import suite_gate
import torch
from step import options
from suite_cases import Case, Figures, measure, selected
from suite_pages import draw, everything, page, unreached
from suite_tables import header, load, notes, text_table

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).resolve().parents[1] / "docs"
OVERHEAD_SHARE = 6.0  # of the time, as the cases have theirs


def write_pages(found: dict[str, Any]) -> None:
    (RESULTS / "performance.md").write_text(everything(found), encoding="utf-8")
    (DOCS / "performance.md").write_text(page(found), encoding="utf-8")
    draw(found, DOCS / "images" / "performance.png")


def write(found: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def budgets(cases: Sequence[Case], number: int, left: float, extra: float = OVERHEAD_SHARE) -> float:
    """Seconds for case `number` of what is left: by its share among those that are still to come."""
    return left * cases[number].share / (sum(case.share for case in cases[number:]) + extra)


def run(cases: Sequence[Case], args: argparse.Namespace, file: Path | None) -> dict[str, Any]:
    """All figures of the cases; after each case what there is so far goes to `file`."""
    found: dict[str, Any] = {"header": header(), "figures": []}
    print("\n".join(f"{key}: {value}" for key, value in found["header"].items()), flush=True)
    whole = not any((args.layers, args.rows, args.precision, args.mode))
    began = time.perf_counter()
    for number, case in enumerate(cases):
        left = args.budget * 60 - (time.perf_counter() - began)
        start = time.perf_counter()
        figures = measure(case, budgets(cases, number, left, OVERHEAD_SHARE if whole else 0.0), args.rounds)
        print(f"\n{text_table(figures)}\n" + "\n".join(notes(figures)))
        print(f"{case.layer}, {case.precision}, {case.mode}: {time.perf_counter() - start:.0f} s", flush=True)
        found["figures"] += [asdict(f) for f in figures]
        if file:
            write(found, file)
    if whole:
        found["overhead"] = overhead.measure(args.rounds or 10, min(100, 10 * (args.rounds or 10)))
    found["header"] |= {"load after": load(), "minutes": f"{(time.perf_counter() - began) / 60:.0f}"}
    if file:
        write(found, file)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--budget", type=float, default=25.0, metavar="MINUTES", help="of the whole run (25)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    parser.add_argument("--pages", action="store_true", help="only write the pages of the recorded figures")
    parser.add_argument("--gate", action="store_true", help="compare a few rows with what is recorded; exit status 1")
    parser.add_argument("--record", action="store_true", help="with --gate: record them")
    args = parser.parse_args(arguments)
    if args.pages:
        write_pages(json.loads((RESULTS / "performance.json").read_text(encoding="utf-8")))
        return 0
    torch.set_num_threads(args.threads)
    if args.gate:
        return suite_gate.main(args.record)
    chosen = selected(args.layers, args.rows, args.precision, args.mode)
    cases = [replace(case, peers=case.peers and not args.no_peers) for case in chosen]
    whole = not any((args.layers, args.rows, args.precision, args.mode))
    found = run(cases, args, args.json or (RESULTS / "performance.json" if whole else None))
    if whole and args.json is None:
        write_pages(found)
    missed = unreached(Figures(**f) for f in found["figures"])
    print("\n".join(["", "goals not reached:", *missed] if missed else ["", "all goals reached"]))
    return 1 if any("fails" in line or "another output" in line for line in missed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
