"""What many adapters on one model cost: eight in one batch, and exchanging one of a thousand on 800 layers.

    python benchmarks/serving.py [--rounds 9] [--json FILE] [--markdown FILE] [--document FILE]

Every round takes all contestants in a shuffled order, so that whatever else the machine does falls on all alike.

*Batches*: one Linear 3072 -> 3072 in fp32 without gradients, 8 samples of 256 tokens, rank 16 (LoKr: factor 8, a whole
w2). *layer alone* has nothing of nerine on it; in *one* all samples have the same adapter, in *eight* each has its own.
*mixed* is two each of LoRA of rank 16 and 4, DoRA(LoRA) and LoKr, over the mean of those alone; *no adapter* is the
layer alone a second time, so that the distance of its ratio from 1 is the noise of the run. Times are those of the
second forward in a `batch` (CPU time, where there is one thread: it suffers less from what else runs), ratios best over
best. *Exchanges*: 800 Linear layers of 32 x 32, 1,000 LoRAs of rank 1.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from step import header, load
from torch import Tensor, nn

import nerine
from nerine.serving import Shelf

WIDTH, SAMPLES, TOKENS, RANK = 3072, 8, 256, 16
MANY_OVER_ONE, SWAP_MS = 1.3, 1.0  # goals
AGAIN = "frozen again"  # the layer alone a second time: how far its ratio is from 1 is the noise of the run
LAYERS, ADAPTERS, NARROW = 800, 1000, 32

KINDS: dict[str, nerine.algorithms.Algorithm] = {
    "LoRA": nerine.LoRA(rank=RANK),
    "DoRA(LoRA)": nerine.DoRA(nerine.LoRA(rank=RANK)),
    "LoKr": nerine.LoKr(factor=8, full_matrix=True),
}
SMALL = nerine.LoRA(rank=4)
MIXED = ["LoRA", "small", "DoRA(LoRA)", "LoKr"]  # two of each in the mixed batch


@dataclass
class Batch:
    """One kind: a batch with one adapter and one with eight different ones; ratios are best over best."""

    kind: str
    frozen_ms: float  # the layer alone
    one_ms: float
    many_ms: float
    one_over_frozen: float
    many_over_frozen: float
    many_over_one: float
    many_over_one_median: float
    goal: float | None
    reached: bool | None


@dataclass
class Swap:
    """Exchanging adapters on the whole model."""

    what: str
    best_ms: float
    median_ms: float
    goal: float | None = None
    reached: bool | None = None


def timed(act: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    act()
    return (clock() - start) * 1e3


def trained(model: nn.Module, algorithm: nerine.algorithms.Algorithm, file: Path, seed: int) -> Path:
    """A file with an adapter that changes something."""
    rng = torch.Generator().manual_seed(seed)
    network = nerine.attach(deepcopy(model), algorithm)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.01)
    nerine.save(network, file)
    return file


# -- eight adapters in one batch -----------------------------------------------------------------------------------
def batches(rounds: int, folder: Path) -> list[Batch]:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).requires_grad_(False)
    plain = deepcopy(model)
    shelf = Shelf(model, resident=64)
    for kind, algorithm in {**KINDS, "small": SMALL}.items():
        for number in range(SAMPLES):
            shelf.add(f"{kind} {number}", trained(model, algorithm, folder / "one.safetensors", number))
    x = torch.randn(SAMPLES, TOKENS, WIDTH)
    entries: dict[str, list[str]] = {f"one {kind}": [f"{kind} 0"] * SAMPLES for kind in (*KINDS, "small")}
    entries |= {f"many {kind}": [f"{kind} {n}" for n in range(SAMPLES)] for kind in KINDS}
    entries["many mixed"] = [f"{kind} {n}" for kind in MIXED for n in range(2)]
    seconds: dict[str, list[float]] = {name: [] for name in ("frozen", AGAIN, *entries)}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name in random.sample(list(seconds), len(seconds)):
                took = one_batch(shelf, model if name in entries else plain, entries.get(name), x)
                if turn:  # the first is to warm up
                    seconds[name].append(took)
    shelf.detach()
    seconds["one no adapter"] = seconds["many no adapter"] = seconds[AGAIN]
    return [batch_of(kind, seconds) for kind in (*KINDS, "mixed", "no adapter")]


def one_batch(shelf: Shelf, model: nn.Module, entries: list[str] | None, x: Tensor) -> float:
    """The second forward within one batch, as all steps of a sampler but the first are."""
    inside: AbstractContextManager[object] = nullcontext() if entries is None else shelf.batch(entries)
    with inside:
        if entries is not None:
            model(x[:, :1])
        return timed(lambda: model(x), time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)


def batch_of(kind: str, seconds: dict[str, list[float]]) -> Batch:
    ones = [f"one {k}" for k in MIXED] if kind == "mixed" else [f"one {kind}"]
    one = sum(min(seconds[name]) for name in ones) / len(ones)
    one_median = sum(median(seconds[name]) for name in ones) / len(ones)
    frozen, many = min(seconds["frozen"]), min(seconds[f"many {kind}"])
    over, goal = many / one, None if kind == "no adapter" else MANY_OVER_ONE
    return Batch(
        kind,
        frozen,
        one,
        many,
        one / frozen,
        many / frozen,
        over,
        median(seconds[f"many {kind}"]) / one_median,
        goal,
        None if goal is None else over <= goal,
    )


# -- a thousand adapters on many layers ------------------------------------------------------------------------------
def swaps(rounds: int, folder: Path) -> list[Swap]:
    model = nn.Sequential(*[nn.Linear(NARROW, NARROW) for _ in range(LAYERS)]).requires_grad_(False)
    file = trained(model, nerine.LoRA(rank=1), folder / "tiny.safetensors", 0)
    shelf = Shelf(model, resident=16)
    reading = timed(lambda: shelf.add("0", file))
    fill(shelf)
    x = torch.randn(SAMPLES, NARROW)
    names = [str(n) for n in range(16)]
    again: list[float] = []
    after: list[float] = []
    with torch.inference_mode():
        for name in names:
            shelf.use(name)
            model(x)
        there = [timed(lambda: shelf.use(random.choice(names))) for _ in range(50 * rounds)]
        for _ in range(rounds):
            again.append(timed(lambda: model(x)))
            shelf.use(random.choice([name for name in names if name not in shelf._traffic.now().names]))
            after.append(timed(lambda: model(x)))
        elsewhere = [timed(lambda n=n: shelf.use(str(n))) for n in range(100, 100 + 50 * rounds)]
    shelf.detach()
    network = nerine.load(model, file)
    loading = [timed(lambda: nerine.load(network, file, swap=True)) for _ in range(2)]
    rows = {
        f"use(name) of a resident one, {ADAPTERS} adapters, {LAYERS} layers": there,
        "use(name) of one that is not": elsewhere,
        "forward again": again,
        "first forward after use(name)": after,
        "shelf.add, from its file": [reading],
        "for comparison, nerine.load(file, into network, swap=True)": loading,
    }
    found = [Swap(what, min(took), median(took)) for what, took in rows.items()]
    found[0].goal, found[0].reached = SWAP_MS, found[0].median_ms <= SWAP_MS
    return found


def fill(shelf: Shelf) -> None:
    """Copies of the first adapter with values of their own, put on the shelf without a thousand files to read."""
    first = shelf._residence.held["0"]
    for number in range(1, ADAPTERS):
        homes = tuple(home._replace(flat=torch.randn_like(home.flat) * 0.01) for home in first.homes)
        shelf._residence.add(replace(first, name=str(number), homes=homes, there={}, pieces={}))


# -- output ----------------------------------------------------------------------------------------------------------
BATCH_HEAD = ("batch", "layer alone ms", "one ms", "eight ms", "one / layer", "eight / layer", "eight / one", "goal")
SWAP_HEAD = ("exchange", "best ms", "median ms", "goal")


def shown(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 10 else f"{ms:.3f}"


def verdict(goal: float | None, reached: bool | None) -> str:
    return "" if goal is None else f"{'reached' if reached else 'not reached'} (≤ {goal:g})"


def tables(found: list[Batch], exchanges: list[Swap]) -> str:
    rows = [
        (
            f.kind,
            *(f"{v:.0f}" for v in (f.frozen_ms, f.one_ms, f.many_ms)),
            *(f"{v:.2f}" for v in (f.one_over_frozen, f.many_over_frozen, f.many_over_one)),
            verdict(f.goal, f.reached),
        )
        for f in found
    ]
    more = [(s.what, shown(s.best_ms), shown(s.median_ms), verdict(s.goal, s.reached)) for s in exchanges]
    return "\n\n".join(_table(head, body) for head, body in ((BATCH_HEAD, rows), (SWAP_HEAD, more)))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rows])


MARKS = ("<!-- measured: written by benchmarks/serving.py -->", "<!-- end of measured -->")


def into(text: str, table: str) -> str:
    """A document with the tables between its marks."""
    before, _, rest = text.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--document", type=Path, metavar="FILE", help="a page whose tables are renewed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    head = header(args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        found, exchanges = batches(args.rounds, Path(folder)), swaps(args.rounds, Path(folder))
    head["load after"] = load()
    table = tables(found, exchanges)
    print(table)
    if args.json:
        rows = {"header": head, "batches": list(map(asdict, found)), "swaps": list(map(asdict, exchanges))}
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        title = "# Many adapters on one model"
        text = f"{title}\n\n{', '.join(f'{k} {v}' for k, v in head.items())}\n\n{table}\n"
        args.markdown.write_text(text, encoding="utf-8")
    if args.document:
        args.document.write_text(into(args.document.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
