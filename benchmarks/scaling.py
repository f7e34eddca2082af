"""What fine-tuning a 12B diffusion transformer needs on 1, 8 and 64 GPUs: the tables and the chart of docs/scaling.md.

    python benchmarks/scaling.py              # the tables as they follow from the recorded counts
    python benchmarks/scaling.py --json       # the same as numbers
    python benchmarks/scaling.py --write      # into docs/scaling.md and docs/images/scaling.png
    python benchmarks/scaling.py --count      # count and measure anew first, into results/scaling.json

Needs diffusers (`".[train]"`), and matplotlib for the chart. Counting happens on the meta device, measuring on a small
Flux on the CPU; no GPU takes part anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scaling_check import check
from scaling_counts import Shape, per_block, plain
from scaling_memory import ALGORITHMS, ALL, FROZEN, GIB, KEEPS, Job, adapt, job
from scaling_pipeline import Machine, ddp, fsdp

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
AUTOCAST = ROOT / "benchmarks" / "results" / "scaling_autocast.json"
DOCUMENT, CHART = ROOT / "docs" / "scaling.md", ROOT / "docs" / "images" / "scaling.png"
START, END = "<!-- {}: written by benchmarks/scaling.py -->", "<!-- end of {} -->"
ROWS = (*ALGORITHMS, ALL)
HOST = 50e-6  # seconds that Python takes for an operation of an adapter: results/gpu.md gives 35 to 73 microseconds
CARDS = (24, 40, 80)
MACHINES = {
    "8 x 400 Gb/s (assumed above)": Machine(),
    "4 x 200 Gb/s": Machine(nic=0.8 * 100e9 / 8),
    "1 x 100 Gb/s": Machine(nic=0.8 * 12.5e9 / 8),
}


def recount() -> None:
    """Count every algorithm, measure a small model, and record both."""
    import diffusers

    counts = {}
    for name in (FROZEN, *ROWS):
        print(f"counting {name}", file=sys.stderr, flush=True)
        counts[name] = {part: plain(found) for part, found in per_block(Shape(), adapt(name)).items()}
    record = {"torch": torch.__version__, "diffusers": diffusers.__version__, "counts": counts, "check": check()}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def jobs(record: dict[str, Any]) -> dict[str, Job]:
    return {name: job(name, counts) for name, counts in record["counts"].items()}


def figures(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything that the tables show, in bytes and seconds, by algorithm."""
    known = jobs(record)
    return {name: _figures(known[name], known[FROZEN]) for name in ROWS}


def _figures(one: Job, frozen: Job) -> dict[str, Any]:
    machine, both = Machine(), (False, True)
    weights = ("bf16",) if one.name == ALL else ("bf16", "fp8", "nf4")
    operations = [0.0 if one.name == ALL else one.operations(frozen, again) for again in both]
    return {
        "trained": one.size.trained,
        "state": one.state,
        "beyond": one.whole.kept - frozen.whole.kept,
        "kept": one.whole.kept,
        "activations": [one.activations(again) for again in both],
        "memory": {how: [one.memory(how, again) for again in both] for how in weights},
        "sharded": {n: [one.sharded(n, again) for again in both] for n in (8, 64)},
        "device": [one.device(machine, again) for again in both],
        "host": [HOST * count for count in operations],
        "ddp_traffic": {n: one.ddp_traffic(n) for n in (8, 64)},
        "fsdp_traffic": {n: one.fsdp_traffic(n) for n in (8, 64)},
        "steps": steps(one, machine),
    }


def steps(one: Job, machine: Machine) -> dict[str, dict[str, float]]:
    """Seconds, exposed seconds and efficiency of a step with checkpointing, by engine and number of GPUs."""
    blocks, optimiser = one.blocks(machine, True), one.optimiser(machine)
    ways = {f"DDP {n}": ddp(blocks, machine, n, optimiser) for n in (8, 64)}
    ways |= {f"FSDP2 {n}": fsdp(blocks, machine, n, optimiser) for n in (8, 64)}
    ways["HSDP 64"] = fsdp(blocks, machine, 64, optimiser, hybrid=True)
    return {
        way: {"seconds": step.seconds, "exposed": step.exposed, "efficiency": 1 - step.exposed / step.seconds}
        for way, step in ways.items()
    }


# -- tables ------------------------------------------------------------------------------------------------------------
def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _gib(bytes_: float) -> str:
    size = bytes_ / GIB
    return f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 0.05 else f"{size:.3f}" if size >= 5e-4 else "0"


def _on_card(bytes_: float) -> str:
    """GiB, with the smallest card of `CARDS` on which it fits with 2 % to spare."""
    card = next((c for c in CARDS if bytes_ <= 0.98 * c * GIB), None)
    return f"{_gib(bytes_)} ({card})" if card else f"{_gib(bytes_)} (-)"


def values_table(found: dict[str, dict[str, Any]]) -> str:
    head = ("", "trained", "their state, GiB", "beyond the frozen layers, GiB", "kept in all, GiB", "checkpointed, GiB")
    rows = []
    for name, f in found.items():
        trained = f"{f['trained'] / 1e6:,.2f} M" if f["trained"] < 1e9 else f"{f['trained'] / 1e9:.2f} B"
        kept = _gib(f["beyond"]) if f["beyond"] >= 0 else f"-{_gib(-f['beyond'])}"
        rows.append((name, trained, _gib(f["state"]), kept, _gib(f["kept"]), _gib(f["activations"][1])))
    return _table(head, rows)


def memory_table(found: dict[str, dict[str, Any]]) -> str:
    head = ("", "bf16", "bf16 ✓", "fp8", "fp8 ✓", "nf4", "nf4 ✓", "FSDP2 on 8", "on 8 ✓", "on 64 ✓")
    rows = []
    for name, f in found.items():
        cells = [_on_card(size) for how in ("bf16", "fp8", "nf4") for size in f["memory"].get(how, ())]
        cells += ["", ""] * (3 - len(f["memory"]))
        rows.append((name, *cells, *map(_on_card, (*f["sharded"][8], f["sharded"][64][1]))))
    return _table(head, rows)


def time_table(found: dict[str, dict[str, Any]]) -> str:
    head = ("", "GPU, s", "GPU ✓, s", "Python ✓, s", "DDP sends, MB", "FSDP2 sends, GB", "DDP 8", "DDP 64")
    head = (*head, "FSDP2 8", "FSDP2 64", "HSDP 64")
    rows = []
    for name, f in found.items():
        times = [f"{t:.2f}" for t in (*f["device"], f["host"][1])]
        sends = [f"{f['ddp_traffic'][64] / 1e6:,.0f}", f"{f['fsdp_traffic'][64] / 1e9:.1f}"]
        if name == ALL:
            times[2] = ""
        ways = [f"{1000 * w['exposed']:.1f} ({100 * w['efficiency']:.1f} %)" for w in f["steps"].values()]
        rows.append((name, *times, *sends, *ways))
    return _table(head, rows)


def network_table(record: dict[str, Any]) -> str:
    head = ("network of a node", "algorithm", "DDP 64", "FSDP2 64", "HSDP 64")
    known, rows = jobs(record), []
    for label, machine in MACHINES.items():
        for name in ("LoRA", "BOFT"):
            found = steps(known[name], machine)
            cells = [
                f"{found[way]['seconds']:.2f} s, {1000 * found[way]['exposed']:,.0f} ms exposed"
                for way in ("DDP 64", "FSDP2 64", "HSDP 64")
            ]
            rows.append((label, name, *cells))
    return _table(head, rows)


def check_table(record: dict[str, Any]) -> str:
    head = (
        "",
        "small: measured, MB",
        "small: counted, MB",
        "apart",
        "12B: counted, GiB",
        "12B: formula, GiB",
        "apart ",
    )
    rows = []
    for name, one in jobs(record).items():
        found = record["check"].get(name)
        measured = ("", "", "")
        if found:
            apart = f"{found['counted'] / found['measured'] - 1:+.2%}"
            measured = (f"{found['measured'] / 1e6:.2f}", f"{found['counted'] / 1e6:.2f}", apart)
        counted = one.blocks_kept
        formula = ("", "")
        if name in KEEPS:
            size = one.blocks_by_formula(KEEPS[name])
            formula = (_gib(size), f"{size / counted - 1:+.2%}")
        rows.append((name, *measured, _gib(counted), *formula))
    return _table(head, rows)


def autocast_table(found: dict[str, Any]) -> str:
    head = ("", "double", "single", "beside, in backward", "autocast: double", "single ", "beside, in backward ")
    rows = []
    for name, both in found["rows"].items():
        cells = [f"{both[how][key]:.1f}" for how in ("bf16", "autocast") for key in ("double", "single", "working")]
        rows.append((name, *cells))
    return _table(head, rows)


def tables(record: dict[str, Any]) -> dict[str, str]:
    found = figures(record)
    return {
        "values": values_table(found),
        "memory": memory_table(found),
        "time": time_table(found),
        "network": network_table(record),
        "autocast": autocast_table(json.loads(AUTOCAST.read_text(encoding="utf-8"))),
    }


def document(text: str, made: dict[str, str]) -> str:
    """`text` with the tables in their places."""
    for name, table in made.items():
        start, end = START.format(name), END.format(name)
        before, rest = text.split(start)
        text = f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
    return text


# -- chart -------------------------------------------------------------------------------------------------------------
def draw(record: dict[str, Any]) -> None:
    """Memory of one GPU and time of a step, by algorithm, with checkpointing."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    known, found = jobs(record), figures(record)
    names = [name for name in ROWS if name != ALL][::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True, layout="constrained")
    colours = {
        "weights": "#4c78a8",
        "values, gradients, AdamW": "#f58518",
        "activations": "#54a24b",
        "reserve": "#bab0ac",
    }
    parts: dict[str, Callable[[str], float]] = {
        "weights": lambda n: known[n].size.weights("bf16"),
        "values, gradients, AdamW": lambda n: known[n].state,
        "activations": lambda n: known[n].activations(True),
        "reserve": lambda n: 1.5 * GIB,
    }
    before = [0.0] * len(names)
    for label, size in parts.items():
        widths = [size(n) / GIB for n in names]
        left.barh(names, widths, left=before, label=label, color=colours[label])
        before = [a + b for a, b in zip(before, widths, strict=True)]
    for card in CARDS:
        left.axvline(card, color="black", linewidth=0.8, linestyle=":")
    edge = 88
    left.set_xlim(0, edge)
    for i, total in enumerate(before):
        text = f"{total:.0f}" if total < edge else f"{total:.0f} →"
        left.text(
            min(total, edge) + (0.8 if total < edge else -1),
            i,
            text,
            va="center",
            fontsize=8,
            ha="left" if total < edge else "right",
        )
    left.set_xlabel("GiB on one GPU (bf16, checkpointing; dotted: 24, 40, 80)")
    left.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    right.barh(names, [found[n]["device"][1] for n in names], height=0.4, align="edge", color="#4c78a8", label="GPU")
    right.barh(
        names,
        [found[n]["host"][1] for n in names],
        height=-0.4,
        align="edge",
        color="#bab0ac",
        label="Python, not compiled: adapters' operations",
    )
    right.set_xlabel("seconds of a step, simulated: the longer one counts")
    right.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    CHART.parent.mkdir(exist_ok=True)
    figure.savefig(CHART, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count and measure anew, and record it")
    parser.add_argument("--write", action="store_true", help="write the tables and the chart into docs/")
    parser.add_argument("--json", action="store_true", help="print numbers, in bytes and seconds")
    options = parser.parse_args()
    if options.count:
        recount()
    record = recorded()
    made = tables(record)
    if options.write:
        DOCUMENT.write_text(document(DOCUMENT.read_text(encoding="utf-8"), made), encoding="utf-8")
        draw(record)
    if options.json:
        print(json.dumps(figures(record), indent=1))
    elif not options.write:
        print("\n\n".join([*made.values(), check_table(record)]))


if __name__ == "__main__":
    main()
