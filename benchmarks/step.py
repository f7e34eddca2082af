"""One training step of one adapted layer, against the same frozen layer, a floor by hand, LyCORIS and PEFT.

    python benchmarks/step.py [--layers ...] [--rows ...] [--json FILE] [--markdown FILE]

Every round takes all rows in a shuffled order, and in each row the frozen layer and all contestants in a shuffled
order, so that whatever else the machine does falls on all alike. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from step_contestants import Contestant, contestants, frozen, say
from step_rows import GOALS, LAYERS, ROWS, Problem, Row, problem
from torch import Tensor

TOLERANCE, GRAD_TOLERANCE = 1e-4, 1e-3  # of the output; of the gradients, over their largest value
WARM_UP = 2
AGAIN = "frozen again"  # the frozen layer a second time: how far its ratio is from 1 is the noise of the run


@dataclass
class Figures:
    """What is known of one contestant at one layer; ratios are to the frozen layer in the same row and run.

    Of a peer that fails nothing is known but the note.
    """

    layer: str
    row: str
    contestant: str
    best_ms: float | None = None  # forward and backward
    ratio: float | None = None  # best over best
    median_ratio: float | None = None  # median over the rounds
    forward_ratio: float | None = None  # forward alone, best over best
    goal: float | None = None
    reached: bool | None = None
    kept_of_weight: float | None = None  # extra bytes kept for backward, over those of the weight
    kept_of_output: float | None = None  # the same, over those of the output
    weight_sized: int = 0  # number of kept tensors of at least the weight's size
    output_sized: int = 0  # number of kept tensors of at least the output's size
    error: float | None = None  # of the output, against the dense reference
    grad_error: float | None = None  # of the gradients, relative, the worst one; None where they are not comparable
    note: str = ""


# -- correctness and memory --------------------------------------------------------------------------------------
def clear(p: Problem, c: Contestant) -> None:
    p.x.grad = None
    for t in c.trained.values():
        t.grad = None


def check(p: Problem, c: Contestant, reference: tuple[Tensor, Tensor, dict[str, Tensor]]) -> tuple[float, float | None]:
    """Errors of the output and of the gradients; None for those where the trained tensors are of another size."""
    y, gx, grads = reference
    clear(p, c)
    got = c.forward(p.x)
    got.backward(p.grad)
    pairs = [(p.x.grad, gx), *((c.trained[name].grad, g) for name, g in grads.items())]
    if any(mine is None or mine.numel() != theirs.numel() for mine, theirs in pairs):
        worst = None
    else:
        errors = [(mine.reshape(theirs.shape) - theirs).abs().max() / theirs.abs().max() for mine, theirs in pairs]
        worst = float(torch.stack(errors).max())
    clear(p, c)
    return float((got.detach() - y).abs().max()), worst


def kept(p: Problem, c: Contestant) -> dict[int, int]:
    """Bytes kept for backward by address of their storage, without input, frozen tensors and trained tensors."""
    own = {t.untyped_storage().data_ptr() for t in (p.x, p.weight, p.bias, *c.trained.values())}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = c.forward(p.x)
    sizes = {at: t.untyped_storage().nbytes() for at, t in found.items() if at not in own}
    del y
    return sizes


# -- time --------------------------------------------------------------------------------------------------------
@dataclass
class Timing:
    forward: list[float]
    total: list[float]


def once(p: Problem, c: Contestant) -> tuple[float, float]:
    clear(p, c)
    start = time.perf_counter()
    y = c.forward(p.x)
    middle = time.perf_counter()
    y.backward(p.grad)
    return middle - start, time.perf_counter() - start


def race(p: Problem, groups: dict[str, list[Contestant]], rounds: int) -> dict[str, dict[str, Timing]]:
    """Time all contestants of all rows, `rounds` times each; the first of each group is the frozen layer."""
    shuffle = random.Random(0).shuffle
    times = {row: {c.name: Timing([], []) for c in group} for row, group in groups.items()}
    for number in range(WARM_UP + rounds):
        rows = list(groups)
        shuffle(rows)
        for row in rows:
            group = list(groups[row])
            shuffle(group)
            for c in group:
                forward, total = once(p, c)
                if number >= WARM_UP:
                    times[row][c.name].forward.append(forward)
                    times[row][c.name].total.append(total)
    return times


def note(row: Row, c: Contestant, error: float, grad_error: float | None) -> str:
    """In what `c` differs from the reference."""
    if not error <= TOLERANCE:  # nor where it is not a number
        return "another output"
    if grad_error is None or not grad_error <= GRAD_TOLERANCE:
        return "norm detached" if c.name == "PEFT" and row.axis else "other gradients"
    return ""


def examine(
    p: Problem, layer: str, row: Row, c: Contestant, reference: tuple[Tensor, Tensor, dict[str, Tensor]], base: int
) -> Figures:
    """What is known of `c` before anything is timed; `base` are the bytes that the frozen layer keeps.

    nerine must agree with the reference; a peer may differ or fail.
    """
    f = Figures(layer, row.name, c.name, note=c.failure)
    if c.failure:
        return f
    try:
        sizes = kept(p, c)
        f.error, f.grad_error = (0.0, 0.0) if c.name == AGAIN else check(p, c, reference)
    except Exception as problem:
        if not c.peer:
            raise
        f.note = say(problem)
        return f
    f.note = note(row, c, f.error, f.grad_error)
    if not c.peer and f.note:
        raise SystemExit(f"{layer}, {row.name}: {c.name} has {f.note}: {f.error:.1e}, {f.grad_error or 0:.1e}")
    extra = sum(sizes.values()) - base
    f.goal = GOALS.get(layer, {}).get(row.name) if c.name == "nerine" else None
    f.kept_of_weight, f.kept_of_output = extra / p.weight.nbytes, extra / p.grad.nbytes
    f.weight_sized = sum(size >= p.weight.nbytes for size in sizes.values())
    f.output_sized = sum(size >= p.grad.nbytes for size in sizes.values())
    return f


def measure(layer: str, rows: list[Row], rounds: int, peers: bool) -> list[Figures]:
    """All figures of one layer."""
    p = problem(layer)
    base = sum(kept(p, frozen(p)).values())
    groups, figures = {}, []
    for row in rows:
        reference = p.reference(row)
        groups[row.name] = [frozen(p)]
        for c in (*contestants(p, row, peers), frozen(p, AGAIN)):
            figures.append(examine(p, layer, row, c, reference, base))
            if figures[-1].error is not None:
                groups[row.name].append(c)
    times = race(p, groups, rounds)
    for f in figures:
        if f.error is None:
            continue
        own, plain = times[f.row][f.contestant], times[f.row]["frozen"]
        f.best_ms = min(own.total) * 1e3
        f.ratio = min(own.total) / min(plain.total)
        f.median_ratio = median(a / b for a, b in zip(own.total, plain.total, strict=True))
        f.forward_ratio = min(own.forward) / min(plain.forward)
        f.reached = None if f.goal is None else f.ratio <= f.goal
    return figures


# -- output ------------------------------------------------------------------------------------------------------
COLUMNS = ("layer", "row", "contestant", "ms", "ratio", "median", "forward", "goal", "", "kept/W", "kept/y", "W", "y")


def header(rounds: int) -> dict[str, str]:
    """On what the figures were made."""
    versions = {}
    for name in ("nerine", "lycoris-lora", "peft"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "cpu": cpu_model(),
        "threads": str(torch.get_num_threads()),
        "rounds": str(rounds),
        "load before": load(),
    }


def load() -> str:
    """The load average over 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def cells(f: Figures) -> tuple[str, ...]:
    reached = "" if f.reached is None else "reached" if f.reached else "not reached"
    return (
        f.layer,
        f.row,
        f.contestant,
        shown(f.best_ms, 1),
        shown(f.ratio),
        shown(f.median_ratio),
        shown(f.forward_ratio),
        shown(f.goal),
        reached or f.note.split(":")[0],
        shown(f.kept_of_weight),
        shown(f.kept_of_output),
        str(f.weight_sized or ""),
        str(f.output_sized or ""),
    )


def marked(f: Figures | None) -> str:
    """The ratio in the short table, with a star where there is a note."""
    return "" if f is None else f"{shown(f.ratio) or 'fails'}{' *' if f.note else ''}"


def text_table(figures: list[Figures]) -> str:
    lines = [COLUMNS, *map(cells, figures)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def notes(figures: list[Figures]) -> list[str]:
    return sorted({f"{f.contestant}, {f.row}: {f.note}" for f in figures if f.note})


def markdown(figures: list[Figures], head: dict[str, str]) -> str:
    """One table a layer: the ratios of all contestants; then all that is known."""
    names = sorted(dict.fromkeys(f.contestant for f in figures), key=lambda name: name == AGAIN)
    lines = ["# One step of one adapted layer", "", ", ".join(f"{k} {v}" for k, v in head.items()), ""]
    lines += ["Forward and backward over those of the frozen layer, best of all rounds. See ../README.md.", ""]
    for layer in dict.fromkeys(f.layer for f in figures):
        lines += [f"## {layer}", "", f"| row | goal | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
        for row in dict.fromkeys(f.row for f in figures if f.layer == layer):
            found = {f.contestant: f for f in figures if (f.layer, f.row) == (layer, row)}
            goal = found["nerine"].goal
            verdict = "" if goal is None else f"{goal:.2f} {'reached' if found['nerine'].reached else 'not reached'}"
            lines.append(f"| {row} | {verdict} | {' | '.join(marked(found.get(n)) for n in names)} |")
        lines.append("")
    found_notes = notes(figures)
    lines += [f"\\* {'; '.join(found_notes)}", ""] if found_notes else []
    lines += ["## Everything", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(f))} |" for f in figures]
    return "\n".join(lines) + "\n"


def profile(layer: str, row: Row, steps: int = 10) -> None:
    """The operations in which nerine spends its time, and those of the frozen layer."""
    p = problem(layer)
    for c in (frozen(p), *contestants(p, row, peers=False)):
        for _ in range(WARM_UP):
            once(p, c)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
            for _ in range(steps):
                once(p, c)
        table = found.key_averages(group_by_input_shape=True).table(
            sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=44, max_shapes_column_width=64
        )
        print(f"\n== {c.name}: {layer}, {row.name}, {steps} steps\n{table}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), metavar="LAYER")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds after the warm-up (12)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (2)")
    parser.add_argument("--no-peers", action="store_true", help="without LyCORIS and PEFT")
    parser.add_argument("--profile", choices=list(ROWS), metavar="ROW", help="only print where a row's time goes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        for layer in args.layers:
            profile(layer, ROWS[args.profile])
        return
    head = header(args.rounds)
    print("\n".join(f"{key}: {value}" for key, value in head.items()), flush=True)
    figures: list[Figures] = []
    for layer in args.layers:
        found = measure(layer, [ROWS[name] for name in args.rows], args.rounds, not args.no_peers)
        figures += found
        print("\n".join(("", text_table(found), *notes(found))), flush=True)
    head["load after"] = load()
    print(f"\nload after: {head['load after']}")
    if args.json:
        args.json.write_text(json.dumps({"header": head, "figures": [asdict(f) for f in figures]}, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(figures, head))


if __name__ == "__main__":
    main()
