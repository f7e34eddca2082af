"""Whether two weights differ at all: beyond what storing one of them in a coarser number format has done to it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["differs", "square", "threshold_of"]

Formats = tuple[torch.dtype, torch.dtype]


def differs(before: Tensor, after: Tensor, formats: Formats) -> bool:
    """Whether any entry differs by more than half a step of the coarser of the two formats in which they are stored;
    by anything, where both are the same."""
    if formats[0] == formats[1]:
        return not torch.equal(before, after)
    coarse = torch.finfo(_coarser(formats))
    relative, least = coarse.eps / 2 * (1 + coarse.eps), coarse.smallest_normal * coarse.eps / 2
    allowed = torch.maximum(before.abs(), after.abs()).mul_(relative).add_(least)
    return bool(((after - before).abs_() > allowed).any())


def threshold_of(formats: Iterable[Formats]) -> str:
    """In words, what counts as no difference in checkpoints of these formats."""
    coarse = {str(_coarser(pair)).removeprefix("torch.") for pair in formats if pair[0] != pair[1]}
    if not coarse:
        return "every entry the same"
    return f"every entry the same within the rounding of {' and '.join(sorted(coarse))}"


def _coarser(formats: Formats) -> torch.dtype:
    return max(formats, key=lambda dtype: float(torch.finfo(dtype).eps))


def square(t: Tensor) -> float:
    """The sum of the squares of all entries, in fp64 where the device has it."""
    dtype = None if t.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(t, dtype=dtype)) ** 2
