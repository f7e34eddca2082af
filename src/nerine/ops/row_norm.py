"""Norms of the rows of a weight, and of a weight plus a low-rank product without building that product.

    |W + B·A|² = |W|² + 2·Σ (W·Aᵀ ∘ B) + Σ (B·(A·Aᵀ) ∘ B)        per row

Everything runs in full precision whatever autocast says: m/|V| - 1 is small, and half precision would lose it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nerine.ops.precision import full_precision, wide
from nerine.ops.recompute import over_wide

__all__ = ["low_rank_column_square", "low_rank_row_square", "low_rank_size", "norm_from_square", "row_square"]


def row_square(weight: Tensor) -> Tensor:
    """Squared norms `[out]` of the rows of `weight` `[out, ...]`."""
    flat = wide(weight).flatten(1)
    return torch.linalg.vector_norm(flat, dim=1).square() if not flat.requires_grad else flat.square().sum(1)


def norm_from_square(square: Tensor, floor: float) -> Tensor:
    """Square root with a floor: never less than `floor`, and with a zero gradient there instead of an infinite one."""
    return square.clamp_min(floor * floor).sqrt()


def low_rank_row_square(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Squared norms `[out]` of the rows of `weight + up·down`; up `[out, rank]`, down `[rank, in·Πk]`."""
    return over_wide(_low_rank, weight, up, down)


def low_rank_column_square(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Squared norms `[in·Πk]` of the columns of `weight + up·down`, likewise."""
    return over_wide(_low_rank_columns, weight, up, down)


def _low_rank_columns(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    with full_precision(weight):
        flat = weight.flatten(1)
        change = 2 * (up.mT @ flat) + (up.mT @ up) @ down  # [rank, in·Πk]
        return flat.square().sum(0) + (change * down).sum(0)


def low_rank_size(up: Tensor, down: Tensor) -> Tensor:
    """|up·down| over all entries, 0-d; up `[out, rank]`, down `[rank, n]`."""
    with full_precision(up):
        return ((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0).sqrt()


def _low_rank(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    with full_precision(weight):
        cross = ((weight.flatten(1) @ down.mT) * up).sum(1)
        own = ((up @ (down @ down.mT)) * up).sum(1)
        return row_square(weight) + 2 * cross + own
