"""From numbers to places on a drawing, and the round numbers to write beside an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Scale", "linear", "logarithmic", "quantile", "without_strays"]


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` on the line from `start` to `stop`; those outside are put on its ends."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """How far along it is, 0 to 1."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        if self.is_log:
            value = math.log(value) if value > 0 else low
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * self.share(value)

    @property
    def ticks(self) -> list[float]:
        """Round numbers within it."""
        if not self.is_log:
            return _round_numbers(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        factors = (1, 2, 5) if last - first <= 3 else (1,)
        found = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
        return [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]


def linear(low: float, high: float, start: float, stop: float) -> Scale:
    return Scale(low, high if high > low else low + 1, start, stop)


def logarithmic(values: Sequence[float], start: float, stop: float) -> Scale:
    """A scale for positive values, with some air; a few that are far from all others end up on its ends."""
    low, high = without_strays(values)
    if high / low < 4:
        low, high = low / 2, high * 2
    return Scale(low / 1.15, high * 1.15, start, stop, True)


def without_strays(values: Sequence[float], times: float = 10.0) -> tuple[float, float]:
    """The least and the largest of positive values, but for those far outside of what nine tenths of them are in."""
    low, high = quantile(values, 0.05), quantile(values, 0.95)
    return max(min(values), low / times), min(max(values), high * times)


def _round_numbers(low: float, high: float, about: int = 5) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / about))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)
