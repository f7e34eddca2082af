"""Norms of the rows of a weight, and of a weight plus a low-rank product without building that product.

    |W + B·A|² = |W|² + 2·Σ (W·Aᵀ ∘ B) + Σ (B·(A·Aᵀ) ∘ B)        per row

Everything runs in full precision whatever autocast says: m/|V| - 1 is small, and half precision would lose it. The
gradients are written out: as a chain of small operations they would cost a small layer more than its own product does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nerine.ops.kernel_choice import standing_in
from nerine.ops.precision import full_precision, wide
from nerine.ops.recompute import over_wide

__all__ = [
    "low_rank_column_square",
    "low_rank_row_norm",
    "low_rank_row_square",
    "low_rank_size",
    "norm_from_square",
    "norm_share",
    "row_square",
]


def row_square(weight: Tensor) -> Tensor:
    """Squared norms `[out]` of the rows of `weight` `[out, ...]`."""
    flat = wide(weight).flatten(1)
    return torch.linalg.vector_norm(flat, dim=1).square() if not flat.requires_grad else flat.square().sum(1)


def norm_from_square(square: Tensor, floor: float) -> Tensor:
    """Square root with a floor: never less than `floor`, and with a zero gradient there instead of an infinite one."""
    return square.clamp_min(floor * floor).sqrt()


def norm_share(grad: Tensor, norm: Tensor, floor: float) -> Tensor:
    """Twice the gradient of such a norm to its square: grad / norm, and nothing at the floor."""
    return (grad / norm).masked_fill_(norm <= floor, 0.0)


def low_rank_row_square(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Squared norms `[out]` of the rows of `weight + up·down`, which may have gradients to all three."""
    return over_wide(_low_rank, weight, up, down)


def low_rank_row_norm(weight: Tensor, up: Tensor, down: Tensor, scale: float, floor: float) -> Tensor:
    """Norms `[out]`, at least `floor`, of the rows of `weight + scale·up·down`, which are as above."""
    kernel = standing_in("low_rank_row_norm", weight, up, down, scale, floor)
    if kernel is not None:
        return kernel(weight, up, down, scale, floor)
    if torch.compiler.is_compiling() or weight.requires_grad:
        return norm_from_square(low_rank_row_square(weight, up * scale, down), floor)
    return _LowRankNorm.apply(weight, up, down, scale, floor)  # type: ignore[no-any-return]


def turned_row_square(weight: Tensor, matrices: Tensor) -> Tensor:
    """Squared norms `[n·s]` of the rows of Mᵀ·W, block by block; `weight` `[n·s, ...]`, matrices M `[n, s, s]`."""
    return over_wide(_turned, weight, matrices)


def _turned(weight: Tensor, matrices: Tensor) -> Tensor:
    n, size, _ = matrices.shape
    with full_precision(weight):
        rows = weight.reshape(n, size, -1)
        gram = torch.bmm(rows, rows.mT)  # [n, s, s]
        return (torch.bmm(gram, matrices) * matrices).sum(1).reshape(-1)


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


class _LowRankNorm(torch.autograd.Function):
    """With C = W·Aᵀ + s·B·(A·Aᵀ), the gradient of |V|² is 2s·C to B, and 2s·(Bᵀ·W + s·(Bᵀ·B)·A) to A, row by row."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, up: Tensor, down: Tensor, scale: float, floor: float) -> Tensor:
        with full_precision(up):
            flat = wide(weight).flatten(1)
            cross = flat @ down.mT  # [out, rank]
            change = torch.addmm(cross, up, down @ down.mT, alpha=scale)
            square = row_square(flat).add_((cross + change).mul_(up).sum(1), alpha=scale)
            norm = norm_from_square(square, floor)
        ctx.scale, ctx.floor = scale, floor
        ctx.save_for_backward(weight, up, down, change if up.requires_grad else None, norm)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, up, down, change, norm = ctx.saved_tensors
        grad_up = grad_down = None
        with full_precision(grad):
            share = norm_share(grad, norm, ctx.floor).mul_(ctx.scale)[:, None]
            if ctx.needs_input_grad[1]:
                grad_up = share * change
            if ctx.needs_input_grad[2]:
                some = (share * up).mT  # [rank, out]
                grad_down = torch.addmm(some @ wide(weight).flatten(1), some @ up, down, alpha=ctx.scale)
        return None, grad_up, grad_down, None, None
