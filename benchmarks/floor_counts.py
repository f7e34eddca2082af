"""The least work that each algorithm takes, counted in operations and bytes, and what that is worth on a machine.

Counted is what comes on top of the frozen layer's two products (forward, and gradient of the input), kernel by kernel:
every kernel reads its operands once and writes its result once, and takes the longer of its operations at the rate of
the layer's own products and its bytes at the rate of a copy. Where an algorithm can be computed exactly in more than
one way, the cheapest counts. Nothing of the weight's size is kept for the backward pass: what it needs is built again.
Small work (a rank by a rank, the turns' inverses, a gain for each output) counts nothing. Nothing here knows nerine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from step_maps import BLOCK, FACTOR, RANK, butterfly_size

__all__ = ["COUNTS", "Path", "Rates", "Size", "Work", "floor", "paths", "seconds"]


class Work(NamedTuple):
    """One kernel: operations (a multiply-add is two), and elements read and written."""

    flops: float
    elements: float


class Rates(NamedTuple):
    """Of one layer on one machine: operations and bytes in a second."""

    flops: float
    bytes: float


Path = list[Work]  # of forward and backward together


@dataclass(frozen=True)
class Size:
    """A layer `[outputs, inputs, taps]` with so many positions of its input and of its output."""

    outputs: int
    inputs: int
    taps: int
    positions: int
    entries: int

    @property
    def weight(self) -> int:
        return self.outputs * self.inputs * self.taps

    @property
    def x(self) -> int:
        return self.entries * self.inputs

    @property
    def y(self) -> int:
        return self.positions * self.outputs

    @property
    def product(self) -> float:
        """Operations of one product with the whole weight."""
        return 2.0 * self.positions * self.weight

    def factor(self, wanted: int, channels: int) -> int:
        """The largest divisor of `channels` up to `wanted`."""
        return max(n for n in range(1, wanted + 1) if channels % n == 0)


def matmul(m: float, k: float, n: float, again: float = 0.0) -> Work:
    """`[m, k]` times `[k, n]`; `again` elements of the result are read as well, for it is added to them."""
    return Work(2 * m * k * n, m * k + k * n + m * n + again)


def passes(elements: float) -> Work:
    """Reading and writing alone."""
    return Work(0.0, elements)


# -- low rank ----------------------------------------------------------------------------------------------------
def low_rank(s: Size, rank: int, trained: int | None = None) -> Path:
    """y += up(down(x)), of whose ranks `trained` are trained (all of them): the first half has the layer's taps."""
    trained = rank if trained is None else trained
    p, flat, h, y = s.positions, s.inputs * s.taps, s.positions * rank, s.y
    learnt = p * trained
    return [
        Work(2.0 * h * flat, s.x + rank * flat + h),  # h = down(x)
        Work(2.0 * h * s.outputs, h + rank * s.outputs + 2 * y),  # y += up(h)
        Work(2.0 * h * s.outputs, y + rank * s.outputs + h),  # gradient of h
        Work(2.0 * learnt * s.outputs, y + learnt + trained * s.outputs),  # of up
        Work(2.0 * learnt * flat, s.x + learnt + trained * flat),  # of down
        Work(2.0 * h * flat, h + rank * flat + 2 * s.x),  # of x, added to the layer's own
    ]


def _lora(s: Size) -> dict[str, Path]:
    return {"beside": low_rank(s, RANK)}


def _tlora(s: Size) -> dict[str, Path]:
    return {"beside": low_rank(s, 2 * RANK, RANK)}


def _glora(s: Size) -> dict[str, Path]:
    """W·a1 first, and then one low-rank product of twice the rank; or the input changed by a2 and a1."""
    half = matmul(s.outputs * s.taps, s.inputs, RANK)  # W·a1, and the same work for the gradient of a1
    found = {"input": _glora_on_input(s)}
    if s.taps == 1:
        found["weight times a1"] = [half, half, *low_rank(s, 2 * RANK)]
    return found


def _glora_on_input(s: Size) -> Path:
    h = s.entries * RANK
    work, thin = 2.0 * h * s.inputs, RANK * s.inputs
    beside = [
        Work(work, s.x + thin + h),  # h = a2(x)
        Work(work, h + thin + 2 * s.x),  # x + a1(h)
        Work(work, s.x + thin + h),  # gradient of h
        Work(work, s.x + thin + h),  # of a1
        Work(work, s.x + thin + h),  # of a2
        Work(work, h + thin + 2 * s.x),  # of x
    ]
    return [*beside, *low_rank(s, RANK)]


# -- through a changed weight --------------------------------------------------------------------------------------
def dense_gradient(s: Size) -> Work:
    """The third product: the gradient of the whole weight."""
    return Work(s.product, s.x + s.y + s.weight)


def _lokr(s: Size) -> dict[str, Path]:
    a, c = s.factor(FACTOR, s.outputs), s.factor(FACTOR, s.inputs)
    b, d = s.outputs // a, s.inputs // c
    mixed = s.entries * a * d  # w1 over the groups of inputs
    w2 = b * d * s.taps
    turn = 2.0 * s.entries * a * c * d
    inner = 2.0 * s.positions * a * w2
    beside = [
        Work(turn, s.x + mixed),
        Work(inner, mixed + w2 + 2 * s.y),
        Work(inner, s.y + w2 + mixed),  # gradient of the mixed input
        Work(inner, s.y + mixed + w2),  # of w2
        Work(turn, s.x + mixed),  # of w1
        Work(turn, mixed + 2 * s.x),  # of x
    ]
    build = passes(2 * s.weight)
    return {
        "beside": beside,
        "weight": [build, build, dense_gradient(s), Work(4.0 * s.weight, s.weight)],
    }


def _loha(s: Size) -> dict[str, Path]:
    """A product of entries of ranks r and r is one of rank r²; or the weight is built, twice."""
    pair = matmul(s.outputs, RANK, s.inputs * s.taps)
    fold = passes(3 * s.weight + s.weight)  # a product of two, added to W
    back = [passes(3 * s.weight + 2 * s.weight), pair, pair, pair, pair]  # gradients of both halves, of four factors
    return {
        "rank r²": low_rank(s, RANK**2),
        "weight": [pair, pair, fold, pair, pair, fold, dense_gradient(s), *back],
    }


def _full(s: Size) -> dict[str, Path]:
    return {"weight": [passes(3 * s.weight), passes(3 * s.weight), dense_gradient(s), passes(s.y)]}


# -- factors of channels -------------------------------------------------------------------------------------------
def output_gain(s: Size) -> Path:
    """y times a number for each output, in place; then the gradient, scaled in place, and that of the numbers."""
    return [passes(2 * s.y), passes(3 * s.y)]


def input_gain(s: Size) -> Path:
    return [passes(2 * s.x), passes(3 * s.x)]


def _ia3(s: Size) -> dict[str, Path]:
    scaled = passes(2 * s.weight)
    return {"output": output_gain(s), "weight": [scaled, scaled, passes(2 * s.y)]}


def _ia3_input(s: Size) -> dict[str, Path]:
    return {"input": input_gain(s)}


# -- turns -------------------------------------------------------------------------------------------------------
def turns(elements: float, block: int, times: int) -> Path:
    """`times` products in blocks with as many elements read as written."""
    return [Work(2.0 * elements * block, 2 * elements)] * times


def _diag_oft(s: Size) -> dict[str, Path]:
    """On the output, or on the weight twice; the gradient of the turns is one of the output's either way."""
    block = s.factor(BLOCK, s.outputs)
    return {
        "output": turns(s.y, block, 3),
        "weight": [*turns(s.weight, block, 2), *turns(s.y, block, 1)],
    }


def _boft(s: Size) -> dict[str, Path]:
    """Stage by stage. Backward turns each stage's output back rather than keep it: on the output three products a
    stage; on the weight it is built again, and a stage takes two products of the dense gradient and one back."""
    block = butterfly_size(s.outputs)
    stages = (s.outputs // block).bit_length()
    return {
        "output": turns(s.y, block, stages * 4),
        "weight": [*turns(s.weight, block, stages * 5), dense_gradient(s)],
    }


def _oft_v2(s: Size) -> dict[str, Path]:
    block = s.factor(BLOCK, s.inputs * s.taps)
    found = {"weight": [*turns(s.weight, block, 3), dense_gradient(s)]}
    if s.taps == 1:
        found["input"] = turns(s.x, block, 3)
    return found


COUNTS: dict[str, Callable[[Size], dict[str, Path]]] = {
    "lora": _lora,
    "dylora": _lora,
    "tlora": _tlora,
    "glora": _glora,
    "lokr": _lokr,
    "loha": _loha,
    "full": _full,
    "ia3": _ia3,
    "ia3-input": _ia3_input,
    "diag-oft": _diag_oft,
    "boft": _boft,
    "oft-v2": _oft_v2,
}


# -- DoRA --------------------------------------------------------------------------------------------------------
def norm(kind: str, s: Size) -> Path:
    """Norms of the changed weight and their gradient; |W|² and W·Wᵀ in blocks never change and count nothing."""
    if kind in ("lora", "dylora"):
        return [matmul(s.outputs, s.inputs * s.taps, RANK)] * 2  # W·downᵀ, and its gradient with respect to down
    if kind == "lokr":
        return [Work(2.0 * s.weight, s.weight)] * 2  # W against w2, in its blocks
    if kind == "loha":
        pair = matmul(s.outputs, RANK, s.inputs * s.taps)
        back = [passes(5 * s.weight), pair, pair, pair, pair]
        return [pair, pair, passes(3 * s.weight), pair, pair, *back]
    if kind == "diag-oft":
        return []
    raise KeyError(f"no count of the norms of {kind}")


def paths(kind: str, axis: str | None, s: Size) -> dict[str, Path]:
    """Every exact way that is counted, by name; `kind` is the name in `MAPS`, `axis` that of DoRA or None."""
    found = COUNTS[kind](s)
    if axis is None:
        return found
    gain = output_gain(s) if axis == "out" else input_gain(s)
    beside = {name: [*path, *gain, *norm(kind, s)] for name, path in found.items()}
    if kind == "loha" and axis == "out":  # the weight is built anyway: its norms and gains are passes over it
        beside["weight"] = [*found["weight"], passes(2 * s.weight), passes(2 * s.weight), passes(3 * s.weight)]
    return beside


# -- worth -------------------------------------------------------------------------------------------------------
def seconds(path: Iterable[Work], rates: Rates, bytes_each: int = 4) -> float:
    """How long the kernels take at these rates, each the longer of its operations and its bytes."""
    return sum(max(work.flops / rates.flops, work.elements * bytes_each / rates.bytes) for work in path)


def floor(kind: str, axis: str | None, s: Size, rates: Rates, bytes_each: int = 4) -> tuple[float, str]:
    """Seconds beyond the frozen layer's of the cheapest way, and its name."""
    found = {name: seconds(path, rates, bytes_each) for name, path in paths(kind, axis, s).items()}
    best = min(found, key=found.__getitem__)
    return found[best], best
