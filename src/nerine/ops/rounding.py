"""Rounding to a narrower number format: to the nearest, or up and down by chance so that the mean is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from nerine.ops.precision import same_dtype

__all__ = ["neighbour", "off_by", "stochastic", "ulps"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def neighbour(rounded: Tensor, towards: Tensor) -> Tensor:
    """The next number of the format of `rounded` in the direction of the sign of `towards`; itself where that is 0."""
    bits = rounded.view(_BITS[rounded.dtype.itemsize])
    up, down = towards > 0, towards < 0
    negative = torch.signbit(same_dtype(rounded, towards))
    away = torch.where(negative, down, up)
    nearer = torch.where(negative, up, down)
    magnitude = bits & torch.iinfo(bits.dtype).max
    crosses = nearer & (magnitude == 0)  # from 0 to the smallest number on the other side
    moved = bits + same_dtype(away, bits) - same_dtype(nearer & ~crosses, bits)
    smallest = torch.where(down, torch.iinfo(bits.dtype).min + 1, 1)
    return torch.where(crosses, same_dtype(smallest, bits), moved).view(rounded.dtype)


def stochastic(exact: Tensor, like: Tensor, rng: torch.Generator) -> Tensor:
    """`exact` in the format of `like`: one of the two numbers around it, the nearer one more often, so that the mean
    over many draws is `exact`."""
    rounded = same_dtype(exact, like)
    error = exact - same_dtype(rounded, exact)
    other = neighbour(rounded, error)
    step = (same_dtype(other, exact) - same_dtype(rounded, exact)).abs()
    chance = torch.where(step > 0, error.abs() / step, torch.zeros_like(step))
    drawn = torch.empty_like(exact).uniform_(generator=rng)
    found = torch.where(drawn < chance, other, rounded)
    return torch.where(torch.isfinite(same_dtype(found, exact)), found, rounded)


def off_by(found: Tensor, exact: Tensor, steps: float = 0.5) -> Tensor:
    """|found - exact| over what is allowed: `steps` steps of the format of `found`, and the noise of sums in fp32.

    Up to 1 `found` can be `exact`, summed in fp32 and rounded once. The noise is counted against the largest entry,
    because an entry may be a small difference of large ones.
    """
    info = torch.finfo(found.dtype)
    size = exact.abs()
    noise = 32 * torch.finfo(torch.float32).eps * size.max()
    allowed = steps * (size * info.eps).clamp_min(info.smallest_normal * info.eps) + noise
    return (same_dtype(found, exact) - exact).abs() / allowed


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their format lie between two tensors, entry by entry."""
    low = torch.iinfo(_BITS[a.dtype.itemsize]).min

    def ordered(t: Tensor) -> Tensor:
        bits = t.contiguous().view(_BITS[t.dtype.itemsize]).long()
        return torch.where(bits < 0, low - bits, bits)

    return (ordered(a) - ordered(b)).abs()
