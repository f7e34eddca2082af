"""Algorithms weighed against each other at equal bytes: each layer its own option, or all layers the same setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from nerine.algorithms import DiagOFT, LoKr, LoRA
from nerine.tools.budget import Option, spread
from nerine.tools.extract.fitting import LEAST
from nerine.tools.extract.prices import OFFSETS
from nerine.tools.inspect.places import spot_of
from nerine.tools.suggest.report import Curve, Share
from nerine.tools.suggest.study import Layer

__all__ = ["Scales", "Uniform", "shares_by", "silent_kinds", "told"]

HEADER = 1000  # bytes of a header beside what stands there about each layer
ENTRIES = 3  # tensors of a layer, as most algorithms have them


@dataclass(frozen=True)
class Uniform:
    """One setting of an algorithm on every layer that can have it."""

    text: str
    bytes: int
    error: float  # squared, those layers included that cannot have it


@dataclass(frozen=True)
class Scales:
    """The layers of a change, ready to be weighed."""

    layers: Sequence[Layer]

    @cached_property
    def total(self) -> float:
        """Σ|D|²."""
        return sum(layer.change for layer in self.layers)

    def relative(self, error: float) -> float:
        """A squared error as |W' - target|/|D|."""
        return math.sqrt(max(error, 0.0) / max(self.total, LEAST))

    def spread(self, names: Sequence[str], size: int) -> float | None:
        """The relative error where each layer gets its own option of these algorithms; None where nothing fits."""
        every = [_together([layer.options[name].options for name in names]) for layer in self.layers]
        left = size - HEADER
        if left <= 0:
            return None
        chosen = spread(every, left)
        taken = sum(options[i].bytes > 0 for options, i in zip(every, chosen, strict=True))
        chosen = spread(every, left + ENTRIES * taken * unused_digits(size))
        if not any(options[i].bytes for options, i in zip(every, chosen, strict=True)):
            return None
        return self.relative(sum(options[i].error for options, i in zip(every, chosen, strict=True)))

    def uniform(self, name: str) -> list[Uniform]:
        """Each setting of an algorithm on all layers, the smallest first."""
        found: dict[str, list[float]] = {}
        for layer in self.layers:
            own = layer.options[name]
            for i, option in enumerate(own.options[1:], 1):
                text = f"LoRA(rank={i})" if name == "lora" else told(own.algorithm(i))
                sums = found.setdefault(text, [0.0, 0.0])
                sums[0] += option.bytes
                sums[1] += layer.change - option.error
        rows = [Uniform(text, int(bytes) + HEADER, self.total - saved) for text, (bytes, saved) in found.items()]
        if name == "lora":
            rows = self._of_full_ranks(rows)
        return sorted(rows, key=lambda row: (row.bytes, row.error))

    def _of_full_ranks(self, rows: Sequence[Uniform]) -> list[Uniform]:
        """Ranks above what a small layer has are all that it has, there."""
        found = []
        bytes, saved = 0.0, 0.0
        ends: dict[int, list[tuple[int, float]]] = {}
        for layer in self.layers:
            options = layer.options["lora"].options
            last = options[-1]
            ends.setdefault(len(options) - 1, []).append((last.bytes, layer.change - last.error))
        for rank, row in enumerate(rows, 1):
            found.append(Uniform(row.text, row.bytes + int(bytes), row.error - saved))
            for size, gain in ends.get(rank, ()):
                bytes, saved = bytes + size, saved + gain
        return found

    def curve(self, name: str, names: Sequence[str], sizes: Sequence[int]) -> Curve:
        """The errors of a choice among algorithms."""
        return Curve(name, tuple(self.spread(names, size) for size in sizes))

    def one_for_all(self, label: str, rows: Sequence[Uniform], sizes: Sequence[int]) -> Curve:
        """The errors of the best setting that fits, the same on every layer."""
        picked = [fitting(rows, size) for size in sizes]
        errors = tuple(None if row is None else self.relative(row.error) for row in picked)
        return Curve(label, errors, tuple("" if row is None else row.text for row in picked))


def unused_digits(size: int) -> int:
    """What the places of a tensor in a file of this size take less than the price of a layer allows for."""
    return OFFSETS - 2 * len(str(size))


def fitting(rows: Sequence[Uniform], size: int) -> Uniform | None:
    """The best of the settings that fit."""
    fits = [row for row in rows if row.bytes <= size]
    return min(fits, key=lambda row: (row.error, row.bytes)) if fits else None


def _together(several: Sequence[Sequence[Option]]) -> list[Option]:
    """Options of several algorithms, each of which begins with having nothing."""
    first, *others = several
    return [*first, *(option for options in others for option in options[1:])]


def told(algorithm: object) -> str:
    """An algorithm with the settings that matter, as one writes it."""
    if isinstance(algorithm, LoKr):
        how = "full_matrix=True" if algorithm.full_matrix else f"rank={algorithm.rank}"
        return f"LoKr({how}, factor={algorithm.factor})"
    if isinstance(algorithm, DiagOFT):
        return f"DiagOFT(block_size={algorithm.block_size})"
    return str(algorithm) if not isinstance(algorithm, LoRA) else f"LoRA(rank={algorithm.rank})"


def shares_by(layers: Sequence[Layer], group: Callable[[str], str]) -> tuple[Share, ...]:
    """The layers in groups, those with the largest share of the change first."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(group(layer.path), []).append(layer)
    total = max(sum(layer.change for layer in layers), LEAST)
    rows = []
    for name, own in found.items():
        change = sum(layer.change for layer in own)
        sizes = [layer.weight for layer in own if layer.weight is not None]
        relative = math.sqrt(change / max(sum(sizes), LEAST)) if sizes else None
        rows.append(Share(name, change / total, len(own), relative, median(layer.directions for layer in own)))
    return tuple(sorted(rows, key=lambda row: (-row.share, row.name)))


def silent_kinds(kinds: Sequence[Share], most: float) -> Mapping[str, float]:
    """{kind of layer: its share} of those that together have less than `most` of the change."""
    found: dict[str, float] = {}
    for share in sorted(kinds, key=lambda share: share.share):
        if sum(found.values()) + share.share >= most:
            break
        found[share.name] = share.share
    return found


def block_of(path: str) -> str:
    spot = spot_of(path)
    return ".".join(filter(None, (spot.component, spot.block or spot.kind)))


def kind_of(path: str) -> str:
    return spot_of(path).kind
