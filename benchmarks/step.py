"""A look at single rows of the performance suite: the table of some cases, or where nerine's time goes in one.

    python benchmarks/step.py --layers linear-1280 --rows LoKr [--rounds 12] [--no-peers] [--json FILE]
    python benchmarks/step.py --layers linear-1280 --profile LoKr

`suite.py` runs all cases and writes the pages; README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from step_contestants import contestants, frozen
from step_measure import step
from step_rows import LAYERS, ROWS, Row, problem
from suite_cases import Figures, known_layers, measure, selected
from suite_tables import header, load, notes, text_table

__all__ = ["header", "load", "main", "options", "profile"]

WARM_UP = 2


def profile(layer: str, row: Row, steps: int = 10) -> None:
    """The operations in which nerine spends its time, and those of the frozen layer."""
    p = problem(layer)
    for c in (frozen(p), *contestants(p, row, peers=False)):
        for _ in range(WARM_UP):
            step(p, c)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
            for _ in range(steps):
                step(p, c)
        table = found.key_averages(group_by_input_shape=True).table(
            sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=44, max_shapes_column_width=64
        )
        print(f"\n== {c.name}: {layer}, {row.name}, {steps} steps\n{table}")


def options(parser: argparse.ArgumentParser) -> None:
    """What selects cases, here and in `suite.py`."""
    parser.add_argument("--layers", nargs="+", choices=known_layers(), metavar="LAYER", help=", ".join(known_layers()))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"])
    parser.add_argument("--mode", nargs="+", choices=["eager", "compiled"])
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--rounds", type=int, help="timed rounds; without it as many as the time allows")
    parser.add_argument("--no-peers", action="store_true", help="without LyCORIS and PEFT")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--profile", choices=list(ROWS), metavar="ROW", help="only print where a row's time goes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.profile:
        for layer in args.layers or ["linear-1280"]:
            if layer not in LAYERS:
                parser.error(f"--profile takes single layers, not {layer}")
            profile(layer, ROWS[args.profile])
        return
    head = header()
    print("\n".join(f"{key}: {value}" for key, value in head.items()), flush=True)
    figures: list[Figures] = []
    for case in selected(args.layers, args.rows, args.precision, args.mode):
        found = measure(replace(case, peers=case.peers and not args.no_peers), 60.0, args.rounds or 12)
        figures += found
        print("\n".join(("", text_table(found), *notes(found))), flush=True)
    head["load after"] = load()
    print(f"\nload after: {head['load after']}")
    if args.json:
        args.json.write_text(json.dumps({"header": head, "figures": [asdict(f) for f in figures]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
