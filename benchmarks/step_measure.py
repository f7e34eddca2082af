"""How one contestant is measured: correctness, memory, and times of training steps and of forwards in eval.

Whoever is measured is a `Contestant`; what it is measured on says its input, the gradient of its output, its format and
what is frozen (`Measured`). Nothing here knows which layers, algorithms or libraries there are.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "Contestant",
    "Measured",
    "Memory",
    "Timing",
    "best_ratio",
    "check",
    "compiled",
    "median_ratio",
    "memory",
    "plan_rounds",
    "race",
    "say",
    "step",
    "tolerances",
    "without_gradients",
]

FEWEST, MOST, FEWEST_OF_PEERS = 10, 40, 3  # rounds
NEAR = 0.1  # sizes this close are taken for the same


@dataclass
class Contestant:
    """A forward, and its trained tensors by nerine's names; or why there is none.

    `modules` are those that are told of training and eval. A `guest` takes part in fewer rounds where time is short.
    """

    name: str
    forward: Callable[[Tensor], Tensor] | None = None
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    peer: bool = False
    failure: str = ""
    modules: Sequence[nn.Module] = ()
    guest: bool = False


class Measured(Protocol):
    """What is measured: a layer or a model."""

    x: Tensor
    grad: Tensor
    precision: str

    def autocast(self) -> AbstractContextManager[object]: ...
    def frozen_tensors(self) -> list[Tensor]: ...


def say(problem: BaseException) -> str:
    """What went wrong and what was at the bottom of it, short enough for a table."""
    while (cause := problem.__cause__) is not None:
        problem = cause
    lines = str(problem).replace("|", "/").splitlines() or [""]
    return f"fails: {type(problem).__name__}: {lines[0].rstrip()[:100]}"


def compiled(c: Contestant) -> Contestant:
    """The same with its forward compiled."""
    assert c.forward is not None
    torch._dynamo.config.recompile_limit = 1000  # all contestants share the code of their forwards
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    whole: Callable[[Tensor], Tensor] = torch.compile(c.forward)
    return Contestant(c.name, whole, c.trained, c.peer, c.failure, c.modules, c.guest)


# -- one step ----------------------------------------------------------------------------------------------------
def clear(m: Measured, c: Contestant) -> None:
    m.x.grad = None
    for t in c.trained.values():
        t.grad = None


def run(m: Measured, c: Contestant) -> Tensor:
    assert c.forward is not None
    with m.autocast():
        return c.forward(m.x)


def step(m: Measured, c: Contestant) -> tuple[float, float]:
    """Seconds of the forward, and of forward and backward."""
    clear(m, c)
    start = time.perf_counter()
    y = run(m, c)
    middle = time.perf_counter()
    y.backward(m.grad)
    end = time.perf_counter()
    del y
    clear(m, c)
    return middle - start, end - start


@torch.no_grad()
def without_gradients(m: Measured, c: Contestant) -> tuple[float, float]:
    """Seconds of a forward as it runs in use, twice, as `step` has two."""
    start = time.perf_counter()
    run(m, c)
    took = time.perf_counter() - start
    return took, took


@contextmanager
def in_eval(contestants: list[Contestant]) -> Iterator[None]:
    modules = [module for c in contestants for module in c.modules]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.train(mode)


# -- correctness and memory --------------------------------------------------------------------------------------
def tolerances(precision: str) -> tuple[float, float]:
    """Of the output and of the gradients, over their largest value."""
    return (1e-4, 1e-3) if precision == "fp32" else (3e-2, 6e-2)


def check(
    m: Measured, c: Contestant, reference: tuple[Tensor, Tensor, dict[str, Tensor]]
) -> tuple[float, float | None]:
    """Errors of the output and of the gradients; None for those where the trained tensors are of another size."""
    y, gx, grads = reference
    clear(m, c)
    got = run(m, c)
    got.backward(m.grad)
    pairs = [(m.x.grad, gx), *((c.trained[name].grad, g) for name, g in grads.items())]
    worst = None
    if all(mine is not None and mine.numel() == theirs.numel() for mine, theirs in pairs):
        worst = max(_error(mine.reshape(theirs.shape), theirs) for mine, theirs in pairs)
    clear(m, c)
    return _error(got.detach(), y), worst


def _error(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.float() - theirs).abs().max() / theirs.abs().max())


@dataclass
class Memory:
    """Of one step: bytes kept for backward (the input counts once, for whoever), the peak of what a step allocates, how
    many kept tensors are of the size of the weight and of the output, and about how many seconds it took."""

    kept: int
    peak: int
    seconds: float
    weight_sized: int = 0
    output_sized: int = 0


def memory(m: Measured, c: Contestant, weight: int | None = None) -> Memory:
    """`weight` is the number of entries of the layer's, where there is one to compare with."""
    sizes = _kept(m, c)
    peak, seconds = _peak(m, c)
    found = Memory(m.x.nbytes + sum(size for size, _ in sizes), peak, seconds)
    if weight is not None:
        found.weight_sized = sum(_is_weight(entries, weight, m.grad.numel()) for _, entries in sizes)
        found.output_sized = sum(_is_output(entries, weight, m.grad.numel()) for _, entries in sizes)
    return found


def _is_weight(entries: int, weight: int, output: int) -> bool:
    """At least as large as the weight; where outputs are larger than that, about as large."""
    return entries >= (1 - NEAR) * weight and (output < weight or entries <= (1 + NEAR) * weight)


def _is_output(entries: int, weight: int, output: int) -> bool:
    return entries >= (1 - NEAR) * output and (weight < output or entries < (1 - NEAR) * weight)


def _kept(m: Measured, c: Contestant) -> list[tuple[int, int]]:
    """Bytes and entries of each storage kept for backward, without input, frozen tensors and trained tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*m.frozen_tensors(), *c.trained.values())}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(m, c)
    sizes = [(t.untyped_storage().nbytes(), t.element_size()) for at, t in found.items() if at not in own]
    del y
    return [(size, size // each) for size, each in sizes]


def _peak(m: Measured, c: Contestant) -> tuple[int, float]:
    """The most bytes that torch's allocator had out at once during a step, beyond those it had before; its seconds."""
    clear(m, c)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _without_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as found:
        start = time.perf_counter()
        run(m, c).backward(m.grad)
        seconds = time.perf_counter() - start
    clear(m, c)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, seconds


@contextmanager
def _without_stderr() -> Iterator[None]:
    """torch's profiler writes a line for every start and stop from below Python."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


# -- time --------------------------------------------------------------------------------------------------------
@dataclass
class Timing:
    """Seconds by the number of the round."""

    forward: dict[int, float] = field(default_factory=dict)
    total: dict[int, float] = field(default_factory=dict)


def best_ratio(own: Mapping[int, float], plain: Mapping[int, float]) -> float:
    return min(own.values()) / min(plain.values())


def median_ratio(own: Mapping[int, float], plain: Mapping[int, float]) -> float:
    """The median of the ratios within a round."""
    return median(took / plain[number] for number, took in own.items())


def race(
    m: Measured,
    groups: dict[str, list[Contestant]],
    rounds: int,
    act: Callable[[Measured, Contestant], tuple[float, float]] = step,
    every: int = 1,
    warm_up: int = 0,
) -> dict[str, dict[str, Timing]]:
    """Time all contestants of all rows, `rounds` times each, guests in every `every`th of them.

    A round takes the rows in a shuffled order, and in a row all who take part in a shuffled order. The `warm_up` rounds
    before the first are not counted.
    """
    shuffle = random.Random(0).shuffle
    times = {row: {c.name: Timing() for c in group} for row, group in groups.items()}
    for number in range(-warm_up, rounds):
        rows = list(groups)
        shuffle(rows)
        for row in rows:
            group = [c for c in groups[row] if not c.guest or number < 0 or number % every == 0]
            shuffle(group)
            for c in group:
                forward, total = act(m, c)
                if number >= 0:
                    times[row][c.name].forward[number] = forward
                    times[row][c.name].total[number] = total
    return times


def race_in_eval(
    m: Measured,
    groups: dict[str, list[Contestant]],
    rounds: int,
    every: int = 1,
    act: Callable[[Measured, Contestant], tuple[float, float]] = without_gradients,
) -> dict[str, dict[str, Timing]]:
    """`race` of forwards in eval and without gradients; the first of each, which may build something, is not timed."""
    with in_eval([c for group in groups.values() for c in group]):
        return race(m, groups, rounds, act, every, warm_up=1)


def plan_rounds(own: float, guests: float, budget: float) -> tuple[int, int]:
    """How many rounds, and in every how many of them guests take part, in about `budget` seconds.

    `own` and `guests` are the seconds of one round of those who always take part, and of the others. There are at
    least ten rounds, whatever they take, and guests are in at least three of them.
    """
    rounds = int(budget / (own + guests))
    if rounds >= FEWEST:
        return min(rounds, MOST), 1
    strides = range(2, FEWEST // FEWEST_OF_PEERS + 1)
    fitting = [n for n in strides if FEWEST * own + -(-FEWEST // n) * guests <= budget]
    return FEWEST, fitting[0] if fitting else strides[-1]
