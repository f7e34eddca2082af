"""The cases of the performance suite and what becomes of one: all figures of a layer, a precision and a mode.

A case is put together, checked, timed in training steps, and timed in forwards in eval; rounds are as many as its share
of the time allows. The floor of each row is computed here from `floor_counts` and from rates measured in the same run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from floor_counts import Rates, Size, floor
from step_contestants import CACHED, adapted, contestants, frozen
from step_measure import (
    Contestant,
    Measured,
    Memory,
    Timing,
    best_ratio,
    check,
    compiled,
    median_ratio,
    memory,
    plan_rounds,
    race,
    race_in_eval,
    run,
    say,
    step,
    tolerances,
)
from step_rows import EVAL_GOAL, GOALS, LAYERS, ROWS, Problem, Row, problem, problem_of
from suite_models import MODELS, Alone, ModelProblem, layers_of, model_contestants, model_problem, nerine_on, plain
from torch import Tensor

__all__ = ["AGAIN", "CASES", "Case", "Figures", "copy_rate", "known_layers", "measure", "selected"]

AGAIN = "frozen again"  # the frozen layer a second time: how far its ratio is from 1 is the noise of the run
GOAL_ROWS = tuple(GOALS["linear-3072"])
SHORT = ("LoRA", "DoRA(LoRA)", "LoKr", "LoHa", "Diag-OFT")


@dataclass(frozen=True)
class Case:
    """`share` is the part of the time that it gets, over the sum of all shares."""

    layer: str
    rows: tuple[str, ...]
    precision: str = "fp32"
    mode: str = "eager"
    share: float = 1.0
    peers: bool = True


# bf16 has no instructions of its own on many CPUs, and compiling takes 3 to 10 seconds a contestant: few rows each.
CASES = (
    Case("linear-320", GOAL_ROWS, share=1.5),
    Case("linear-1280", tuple(ROWS), share=4),
    Case("linear-3072", GOAL_ROWS, share=13),
    Case("linear-4096x11008", SHORT[:4], share=5),
    Case("conv-320", GOAL_ROWS, share=5),
    Case("conv-1280", SHORT, share=4),
    Case("unet", SHORT[:4], share=4),
    Case("block", SHORT, share=3),
    Case("linear-1280", SHORT[:4], precision="bf16", share=3),
    Case("conv-320", ("LoRA", "LoKr"), precision="bf16", share=4),
    Case("block", ("LoRA", "DoRA(LoRA)", "LoKr"), precision="bf16", share=3),
    Case("linear-1280", SHORT[:4], mode="compiled", share=4),
    Case("block", ("LoRA",), mode="compiled", share=3, peers=False),
)


@dataclass
class Figures:
    """What is known of one contestant; ratios are to the frozen layer in the same row and run.

    Of a peer that fails nothing is known but the note.
    """

    layer: str
    precision: str
    mode: str
    row: str
    contestant: str
    rounds: int = 0
    best_ms: float | None = None  # forward and backward
    ratio: float | None = None  # of these, best over best
    median_ratio: float | None = None  # median over the rounds of the ratio within a round
    forward_ratio: float | None = None  # forward in training, best over best
    eval_ms: float | None = None  # forward in eval, without gradients
    eval_ratio: float | None = None
    eval_median: float | None = None
    cached_ratio: float | None = None  # the same within `network.cached(weights=True)`
    floor: float | None = None  # the ratio that operations and bytes allow
    floor_way: str = ""
    over_floor: float | None = None  # ratio over floor, less one
    kept: float | None = None  # bytes kept for backward and the input, over those of the frozen layer and the input
    kept_of_output: float | None = None  # bytes kept beyond the frozen layer's, over those of the output
    peak: float | None = None  # peak of what a step allocates
    weight_sized: int = 0  # kept tensors of at least the weight's size
    output_sized: int = 0
    goal: float | None = None
    reached: bool | None = None
    eval_reached: bool | None = None
    kept_reached: bool | None = None
    error: float | None = None  # of the output, against the reference, relative
    grad_error: float | None = None
    note: str = ""


@dataclass
class Racers:
    """All that takes part in a case, by row, the frozen layer first; and what was found before anything is timed."""

    m: Measured
    groups: dict[str, list[Contestant]]
    figures: list[Figures]
    own: float = 0.0  # seconds of a round of those who always take part, training and eval
    guests: float = 0.0
    cached: dict[str, Contestant] = field(default_factory=dict)  # nerine once more, for eval alone

    def take(self, c: Contestant, row: str, seconds: float) -> None:
        """`seconds` are those of a training step."""
        self.groups[row].append(c)
        seconds *= 1.4  # and a forward in eval
        if c.guest:
            self.guests += seconds
        else:
            self.own += seconds


# -- putting together and checking -----------------------------------------------------------------------------------
def _note(row: Row, c: Contestant, error: float, grad_error: float | None, precision: str) -> str:
    """In what `c` differs from the reference."""
    most, grad_most = tolerances(precision)
    if not error <= most:  # nor where it is not a number
        return "another output"
    if grad_error is None or not grad_error <= grad_most:
        return "norm detached" if c.name == "PEFT" and row.axis else "other gradients"
    return ""


def examine(m: Measured, f: Figures, c: Contestant, check_it: Callable[[], str], base: Memory) -> float | None:
    """Fill in what is known of `c` before anything is timed; about the seconds of a step, or None if it fails."""
    if c.failure:
        f.note = c.failure
        return None
    weight = m.weight.numel() if isinstance(m, Problem) else None
    try:
        f.note = check_it()
        found = memory(m, c, weight)
    except Exception as problem:
        f.note = say(problem)
        return None
    f.kept, f.peak = found.kept / base.kept, found.peak / base.peak
    if weight is not None:
        f.kept_of_output = (found.kept - base.kept) / m.grad.nbytes
    f.weight_sized, f.output_sized = found.weight_sized, found.output_sized
    if c.name == "nerine" and weight is not None:
        f.kept_reached = f.weight_sized == 0 and f.output_sized <= 1
    return found.seconds


def _against_reference(p: Problem, row: Row, c: Contestant, f: Figures, reference: Any) -> str:
    f.error, f.grad_error = check(p, c, reference)
    return _note(row, c, f.error, f.grad_error, p.precision)


def _against_merged(p: ModelProblem, c: Contestant, f: Figures, merged: Tensor | None) -> str:
    if merged is None:
        step(p, c)  # whether it works
        return ""
    with torch.no_grad():
        got = run(p, c).float()
    f.error = float((got - merged).abs().max() / merged.abs().max())
    return "" if f.error <= tolerances(p.precision)[0] else "another output than merged"


def _entrants(m: Any, case: Case, row: Row) -> Iterable[tuple[Contestant, Callable[[Contestant, Figures], str]]]:
    """Everyone but the frozen layer, and how each is checked."""
    if isinstance(m, ModelProblem):
        for c, merged in model_contestants(m, row, case.peers):
            yield c, lambda c, f, merged=merged: _against_merged(m, c, f, merged)
        return
    reference = m.reference(row)
    for c in contestants(m, row, case.peers):
        yield c, lambda c, f: _against_reference(m, row, c, f, reference)


def assemble(case: Case) -> Racers:
    """Everyone of a case, checked."""
    models = case.layer in MODELS
    m: Any = model_problem(case.layer, case.precision) if models else problem(case.layer, case.precision)
    bare: Callable[..., Contestant] = plain if models else frozen
    wrap = compiled if case.mode == "compiled" else (lambda c: c)
    first = wrap(bare(m))
    base = memory(m, first)
    racers = Racers(m, {}, [])
    for number, name in enumerate(case.rows):
        racers.groups[name] = []
        racers.take(first, name, base.seconds)
        for c, how in _entrants(m, case, ROWS[name]):
            f = Figures(case.layer, case.precision, case.mode, name, c.name)
            racers.figures.append(f)
            c = c if c.failure else wrap(c)
            seconds = examine(m, f, c, lambda c=c, f=f, how=how: how(c, f), base)
            if seconds is not None:
                racers.take(c, name, seconds)
        if case.mode == "eager":
            row = ROWS[name]
            racers.cached[name] = nerine_on(m, row, True)[0] if models else adapted(m, row, cached=True)
        if number == 0:  # the noise is that of the run: once is enough
            racers.figures.append(Figures(case.layer, case.precision, case.mode, name, AGAIN))
            racers.take(wrap(bare(m, AGAIN)), name, base.seconds)
        gc.collect()
    return racers


# -- the floor -----------------------------------------------------------------------------------------------------
def copy_rate(nbytes: int) -> float:
    """Bytes in a second, read and written, of copying a tensor of that size, which may be one that caches hold."""
    source = torch.zeros(max(1, nbytes // 4))
    target = torch.empty_like(source)
    best, until = float("inf"), time.perf_counter() + 0.05
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def size_of(p: Problem) -> Size:
    out, inputs, *kernel = p.weight.shape
    return Size(out, inputs, torch.Size(kernel).numel(), p.grad.numel() // out, p.x.numel() // inputs)


def layer_floor(p: Problem, row: Row, seconds: float) -> tuple[float, str]:
    """Seconds beyond the frozen layer's step, which takes `seconds`, and the way."""
    size = size_of(p)
    rates = Rates(2 * size.product / seconds, copy_rate(p.grad.nbytes))
    return floor(row.kind, row.axis, size, rates, p.grad.element_size())


def model_floor(alone: list[tuple[Alone, int, Rates]], row: Row, each: int) -> float:
    """Seconds of all adapted layers of a model."""
    return sum(count * floor(row.kind, row.axis, one.size, rates, each)[0] for one, count, rates in alone)


def rates_of_layers(m: ModelProblem) -> list[tuple[Alone, int, Rates]]:
    """Every distinct layer with its count, the rate of a copy of its output, and that of the fastest product of all: a
    product of few positions is bound by the passage of its weight."""
    found = []
    with m.autocast():
        layers = layers_of(m.model, m.x)
    for one, count in layers.items():
        p = problem_of(one.build, one.x, m.precision)
        c = frozen(p)
        seconds = min(step(p, c)[1] for _ in range(6))
        found.append((one, count, Rates(2 * one.size.product / seconds, copy_rate(p.grad.nbytes))))
    fastest = max(rates.flops for *_, rates in found)
    return [(one, count, rates._replace(flops=fastest)) for one, count, rates in found]


def add_floors(m: Any, figures: list[Figures], plain_seconds: dict[str, float]) -> None:
    """Floors of nerine's rows; `plain_seconds` are those of the frozen layer or model in each row."""
    alone = rates_of_layers(m) if isinstance(m, ModelProblem) else []
    for f in figures:
        if f.contestant != "nerine" or f.ratio is None:
            continue
        row, base = ROWS[f.row], plain_seconds[f.row]
        if isinstance(m, ModelProblem):
            extra = model_floor(alone, row, m.grad.element_size())
        else:
            extra, f.floor_way = layer_floor(m, row, base)
        f.floor = 1 + extra / base
        f.over_floor = f.ratio / f.floor - 1


# -- the whole case --------------------------------------------------------------------------------------------------
def fill_in(f: Figures, own: tuple[Timing, Timing], plain_times: tuple[Timing, Timing], case: Case) -> None:
    """Ratios of one contestant from its times of training and of eval, and those of the frozen layer."""
    (training, used), (bare, bare_used) = own, plain_times
    f.rounds = len(training.total)
    f.best_ms = min(training.total.values()) * 1e3
    f.ratio = best_ratio(training.total, bare.total)
    f.median_ratio = median_ratio(training.total, bare.total)
    f.forward_ratio = best_ratio(training.forward, bare.forward)
    if used.total:
        f.eval_ms = min(used.total.values()) * 1e3
        f.eval_ratio, f.eval_median = best_ratio(used.total, bare_used.total), median_ratio(used.total, bare_used.total)
    if f.contestant == "nerine":
        if case.precision == "fp32" and case.mode == "eager":
            f.goal = GOALS.get(case.layer, {}).get(f.row)
        f.reached = None if f.goal is None else f.ratio <= f.goal
        used_ratios = [ratio for ratio in (f.eval_ratio, f.cached_ratio) if ratio is not None]
        f.eval_reached = min(used_ratios) <= EVAL_GOAL if used_ratios else None


def measure(case: Case, budget: float, rounds: int | None = None) -> list[Figures]:
    """All figures of one case, in about `budget` seconds if no number of `rounds` is given."""
    began = time.perf_counter()
    racers = assemble(case)
    left = budget - (time.perf_counter() - began)
    planned, every = plan_rounds(racers.own, racers.guests, left) if rounds is None else (rounds, 1)
    training = race(racers.m, racers.groups, planned, every=every)
    # by hand there is nothing that could be kept from one forward to the next
    users = {row: [c for c in group if c.name != "by hand"] for row, group in racers.groups.items()}
    for row, one in racers.cached.items():
        users[row].append(one)
    used = race_in_eval(racers.m, users, planned, every)
    for f in racers.figures:
        if f.contestant in training[f.row]:
            own = training[f.row][f.contestant], used[f.row].get(f.contestant, Timing())
            if f.contestant == "nerine" and CACHED in used[f.row]:
                f.cached_ratio = best_ratio(used[f.row][CACHED].total, used[f.row]["frozen"].total)
            fill_in(f, own, (training[f.row]["frozen"], used[f.row]["frozen"]), case)
    add_floors(racers.m, racers.figures, {row: min(t["frozen"].total.values()) for row, t in training.items()})
    return racers.figures


def known_layers() -> list[str]:
    return [*LAYERS, *MODELS]


def selected(
    layers: list[str] | None, rows: list[str] | None, precisions: list[str] | None, modes: list[str] | None
) -> list[Case]:
    """The cases that options select; a layer, precision or mode that is asked for in a combination that is no case
    becomes one of the rows of `SHORT`."""
    if layers is None and precisions is None and modes is None:
        found = list(CASES)
    else:
        known = {(c.layer, c.precision, c.mode): c for c in CASES}
        wanted = [
            (layer, precision, mode)
            for layer in layers or dict.fromkeys(c.layer for c in CASES)
            for precision in precisions or ["fp32"]
            for mode in modes or ["eager"]
        ]
        found = [known.get(key, Case(key[0], SHORT, key[1], key[2])) for key in wanted]
    return found if rows is None else [replace(c, rows=tuple(rows)) for c in found]
