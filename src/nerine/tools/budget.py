"""Bytes spent where they save the most error: one option of each layer, so that together they fit into a size.

What a layer can have are points (bytes, error). Only those on the lower convex hull can be best at some price of a
byte, so the bytes go step by step to the layer whose next step on its hull saves the most error a byte. Where the next
step does not fit any more, the bytes left go to whatever still fits, again the best error a byte first. At the ends of
steps no choice is better; between them it is at most one step away from the best, and more bytes are never worse.

Source: the Lagrangian view of rate and distortion (Shoham and Gersho 1988), from their idea alone.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from nerine.errors import OptionError

__all__ = ["Option", "bound", "lower_hull", "spread"]


class Option(NamedTuple):
    """What a layer may have: bytes and error, both of which add up over layers."""

    bytes: int
    error: float


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Which options are best at some price of a byte, from the smallest one on, each larger one with less error.

    Of options of one size the best, of equal ones the first.
    """
    order = sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].error, i))
    hull: list[int] = []
    for i in order:
        if hull and options[i].error >= options[hull[-1]].error:
            continue  # larger and no better
        while len(hull) > 1 and _gain(options, hull[-2], hull[-1]) <= _gain(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _gain(options: Sequence[Option], before: int, after: int) -> float:
    """Error saved a byte."""
    a, b = options[before], options[after]
    return (a.error - b.error) / (b.bytes - a.bytes)


def spread(layers: Sequence[Sequence[Option]], size: int) -> list[int]:
    """The option of each layer, by its index, that together take at most `size` bytes.

    Raises:
        OptionError: the smallest options together are larger already.
    """
    job = _Spending(layers, size)
    while (step := job.next()) is not None:
        job.take(*step)
    return job.chosen


class _Spending:
    """How far the bytes have gone. `steps` has the next step of each layer, the best error a byte first; those of the
    hull as long as they fit, and then any."""

    def __init__(self, layers: Sequence[Sequence[Option]], size: int) -> None:
        self.layers = layers
        self.hulls = [lower_hull(options) for options in layers]
        self.chosen = [hull[0] for hull in self.hulls]
        self.at = [0] * len(layers)  # on the hull; -1 once the layer has left it
        least = sum(options[i].bytes for options, i in zip(layers, self.chosen, strict=True))
        self.left = size - least
        if self.left < 0:
            raise OptionError(f"the size is {size:,} bytes, and the least that there can be takes {least:,}")
        self.steps: list[tuple[float, int, int]] = []
        for layer in range(len(layers)):
            self._offer(layer)

    def next(self) -> tuple[int, int] | None:
        """The layer and the option to take next, None where nothing fits."""
        while self.steps:
            _, layer, option = heapq.heappop(self.steps)
            if self._cost(layer, option) <= self.left:
                return layer, option
            self.at[layer] = -1
            self._offer(layer)
        return None

    def take(self, layer: int, option: int) -> None:
        self.left -= self._cost(layer, option)
        self.chosen[layer] = option
        if self.at[layer] >= 0:
            self.at[layer] += 1
        self._offer(layer)

    def _cost(self, layer: int, option: int) -> int:
        options = self.layers[layer]
        return options[option].bytes - options[self.chosen[layer]].bytes

    def _offer(self, layer: int) -> None:
        """Put the next step of a layer on the heap, if it has one."""
        options, now, at = self.layers[layer], self.chosen[layer], self.at[layer]
        if at >= 0:
            hull = self.hulls[layer]
            if at + 1 < len(hull):
                heapq.heappush(self.steps, (-_gain(options, now, hull[at + 1]), layer, hull[at + 1]))
            return
        fitting = (
            (-_gain(options, now, i), layer, i)
            for i, option in enumerate(options)
            if 0 < option.bytes - options[now].bytes <= self.left and option.error < options[now].error
        )
        best = min(fitting, default=None)
        if best is not None:
            heapq.heappush(self.steps, best)


def bound(layers: Sequence[Sequence[Option]], size: int) -> float:
    """The least error that could be if a step could be taken in part: no choice of options is below it."""
    hulls = [lower_hull(options) for options in layers]
    left = float(size - sum(options[hull[0]].bytes for options, hull in zip(layers, hulls, strict=True)))
    error = sum(options[hull[0]].error for options, hull in zip(layers, hulls, strict=True))
    steps = sorted(
        (-_gain(options, a, b), options[b].bytes - options[a].bytes)
        for options, hull in zip(layers, hulls, strict=True)
        for a, b in itertools.pairwise(hull)
    )
    for gain, cost in steps:
        part = min(float(cost), left)
        error += gain * part
        left -= part
        if left <= 0:
            break
    return error
