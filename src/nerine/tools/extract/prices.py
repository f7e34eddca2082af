"""What an adapter takes in a file: the bytes of its tensors, and of what stands about them in the header."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nerine.algorithms import Algorithm
from nerine.files.pieces import ALPHA
from nerine.site import Site

__all__ = ["Price", "price_of"]

OFFSETS = 2 * 9  # digits of the two places in the file that each entry tells
SETTINGS = 16  # what the metadata say of a layer beside its name
KEPT = {"magnitude": 4}  # bytes of a number, whatever the format of the file


@dataclass(frozen=True)
class Price:
    """How a layer is written: the format of its numbers, and how long its name is."""

    dtype: torch.dtype
    name: int

    def of(self, algorithm: Algorithm, site: Site, bias: bool = False) -> int:
        """Bytes of the adapter of that algorithm; `bias` where the change of one goes with it."""
        design = algorithm.design(site)
        total = SETTINGS + self.name
        specs = design.layout.specs
        for tensor, shape in design.shapes.items():
            if tensor == "diff_b" and not bias:
                continue
            total += math.prod(shape) * KEPT.get(tensor, self.dtype.itemsize) + self._entry(specs[tensor].key, shape)
        total += sum(8 + self._entry(mark, ()) for mark in design.layout.marks)
        return total + (4 + self._entry(ALPHA, ()) if design.layout.alpha else 0)

    def _entry(self, suffix: str, shape: tuple[int, ...]) -> int:
        """A tensor in the header."""
        digits = sum(len(str(size)) + 1 for size in shape)
        return self.name + len(suffix) + len('".":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + digits + OFFSETS


def price_of(stem: str, path: str, dtype: torch.dtype) -> Price:
    """That of a layer whose name before the suffix is `stem`."""
    return Price(dtype, max(len(stem), len(path)))
