"""Directions apart from their lengths: rows V_i of which only V_i/|V_i| counts, and a length for each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nerine.ops.precision import full_precision

__all__ = ["Lengths", "best_lengths"]


class Lengths(NamedTuple):
    """`magnitude` `[n]`: the best length of each row of V; `share` `[n]`: by what the rows of the target are multiplied
    to lie nearest to those of V; `error`: |target - magnitude·V/|V|| over all."""

    magnitude: Tensor
    share: Tensor
    error: float


@torch.no_grad()
def best_lengths(v: Tensor, target: Tensor, floor: float) -> Lengths:
    """For rows of any shape, `[n, ...]` both; norms are never taken as less than `floor`.

    A magnitude is never exactly zero: that would say that the row has no direction.
    """
    with full_precision(v):
        v, target = v.flatten(1), target.flatten(1)
        dot, square = (v * target).sum(1), target.square().sum(1)
        norm = torch.linalg.vector_norm(v, dim=1).clamp_min(floor)
        magnitude = dot / norm
        magnitude = torch.where(magnitude == 0, floor, magnitude)
        error = torch.linalg.vector_norm(target - v * (magnitude / norm)[:, None])
        share = torch.where((square > 0) & (dot != 0), dot / square, 1.0)
        return Lengths(magnitude, share, float(error))
