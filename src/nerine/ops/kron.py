"""Kronecker products: dense, applied to channels, and the row norms of a sum with one.

(w1 ⊗ w2)[a·B + b, c·D + d, *k] = w1[a, c] · w2[b, d, *k]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nerine.ops.low_rank_fit import leading
from nerine.ops.precision import full_precision, wide
from nerine.ops.recompute import over_wide
from nerine.ops.row_norm import norm_from_square, norm_share, row_square

__all__ = [
    "add_kron",
    "factorize",
    "kron",
    "kron_row_norm",
    "kron_row_square",
    "kron_rows",
    "mix_channels",
    "nearest_kron",
]


_SMALL = 2**18  # entries of a weight up to which a pass that multiplies and adds is faster than many small products


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """Split `size` into two factors, the smaller one first.

    With a positive `factor` that divides `size`, that factor and its cofactor. Otherwise the pair nearest to the
    square root whose smaller factor is at most `factor` (no bound where it is negative).
    Source: the rule by which LyCORIS files choose the shapes of LoKr, restated.
    """
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    bound = factor if factor > 0 else size
    small = max(m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and (m <= bound or m == 1))
    return small, size // small


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """The dense product `[a·b, c·d, *k]` of `w1` `[a, c]` and `w2` `[b, d, *k]`."""
    a, c = w1.shape
    b, d, *kernel = w2.shape
    left = w1.reshape(a, 1, c, 1, *[1] * len(kernel))
    return (left * w2.reshape(1, b, 1, d, *kernel)).reshape(a * b, c * d, *kernel)


def add_kron(weight: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """weight + w1 ⊗ w2 in one pass; `weight` `[a·b, c·d, *k]`."""
    a, c = w1.shape
    b, d, *kernel = w2.shape
    ones = [1] * len(kernel)
    blocks = weight.reshape(a, b, c, d, *kernel)
    return torch.addcmul(blocks, w1.reshape(a, 1, c, 1, *ones), w2.reshape(1, b, 1, d, *kernel)).reshape(weight.shape)


def kron_rows(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """The entries of `matrix` `[a·b, c·d, *k]` as `[a·c, b·d·Πk]`, where w1 ⊗ w2 is one column times one row.

    Source: Van Loan and Pitsianis 1993.
    """
    a, c = shape
    blocks = matrix.reshape(a, matrix.shape[0] // a, c, matrix.shape[1] // c, -1)
    return blocks.permute(0, 2, 1, 3, 4).reshape(a * c, -1)


@torch.no_grad()
def nearest_kron(matrix: Tensor, shape: tuple[int, int], kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """w1 of `shape` `[a, c]` and w2 `[b, d, *k]` whose Kronecker product is nearest to `matrix` `[a·b, c·d, *k]`."""
    a, c = shape
    found = leading(kron_rows(matrix, shape), 1, tolerance=1e-5)
    root = found.s[0].sqrt()
    w2 = (root * found.vh[0]).reshape(matrix.shape[0] // a, matrix.shape[1] // c, *kernel)
    return (root * found.u[:, 0]).reshape(a, c), w2


def mix_channels(x: Tensor, w1: Tensor, channel: int) -> Tensor:
    """Apply `w1` `[a, c]` to the coarse half of the channels.

    `x` has `c·d` channels at dimension `channel` (negative); the result has `d` channels there and `a` right before.
    """
    split = x.unflatten(channel, (w1.shape[1], -1))
    if channel == -1:
        flat = split.reshape(-1, *split.shape[-2:])
        # one small product for each position: broadcasting would transpose the whole activation instead
        mixed = torch.bmm(w1.expand(flat.shape[0], -1, -1), flat)
        return mixed.reshape(*split.shape[:-2], *mixed.shape[1:])  # [..., a, d]
    coarse = split.movedim(channel - 1, -1)
    return torch.matmul(coarse, w1.mT).movedim(-1, channel - 1)


def kron_row_square(weight: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Squared norms `[out]` of the rows of `weight + w1 ⊗ w2`, without the dense product."""
    return over_wide(_row_square, weight, w1, w2)


def kron_row_norm(weight: Tensor, w1: Tensor, w2: Tensor, floor: float) -> Tensor:
    """Norms `[out]`, at least `floor`, of the same rows."""
    if torch.compiler.is_compiling() or weight.requires_grad:
        return norm_from_square(kron_row_square(weight, w1, w2), floor)
    return _KronNorm.apply(weight, w1, w2, floor)  # type: ignore[no-any-return]


def _row_square(weight: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    taps = w2.flatten(1)
    with full_precision(weight):
        along = _along(weight, w1, taps)
        own = w1.square().sum(1)[:, None] * taps.square().sum(1)
        return row_square(weight) + (2 * (along * w1[:, None]).sum(2) + own).reshape(-1)


def _blocks(weight: Tensor, w1: Tensor, taps: Tensor) -> Tensor:
    """`[a, b, c, d·Πk]`."""
    return weight.reshape(w1.shape[0], taps.shape[0], w1.shape[1], -1)


def _along(weight: Tensor, w1: Tensor, taps: Tensor) -> Tensor:
    """What of each block of a row lies along w2 `[a, b, c]`: 1/d of the weight's size."""
    blocks = _blocks(weight, w1, taps)
    if weight.numel() <= _SMALL:
        return (blocks * taps[:, None]).sum(3)
    return torch.matmul(blocks, taps[:, :, None])[..., 0]


def _summed_blocks(weight: Tensor, w1: Tensor, taps: Tensor, share: Tensor) -> Tensor:
    """The blocks of all rows, each times its entry of w1 and the `share` `[a, b]` of its row: `[b, d·Πk]`."""
    blocks, factors = _blocks(weight, w1, taps), share[:, :, None] * w1[:, None]  # [a, b, c]
    if weight.numel() <= _SMALL:
        return (blocks * factors[..., None]).sum((0, 2))
    return torch.matmul(factors[:, :, None], blocks)[:, :, 0].sum(0)


class _KronNorm(torch.autograd.Function):
    """The gradient of |V|² is 2·(along + w1·|w2|²) to w1, and 2·(w1·W + |w1|²·w2) to w2, summed over the rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, w1: Tensor, w2: Tensor, floor: float) -> Tensor:
        with full_precision(w1):
            own, taps = wide(weight), w2.flatten(1)
            along = _along(own, w1, taps)
            lengths = w1.square().sum(1), taps.square().sum(1)
            square = (along * w1[:, None]).sum(2).mul_(2).addcmul_(lengths[0][:, None], lengths[1])
            norm = norm_from_square(square.reshape(-1).add_(row_square(own)), floor)
        ctx.floor = floor
        ctx.save_for_backward(weight, w1, w2, along if w1.requires_grad else None, norm, *lengths)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, w1, w2, along, norm, length_1, length_2 = ctx.saved_tensors
        of_w1 = of_w2 = None
        taps = w2.flatten(1)
        with full_precision(grad):
            share = norm_share(grad, norm, ctx.floor).reshape(len(w1), -1)  # [a, b]
            if ctx.needs_input_grad[1]:
                of_w1 = torch.matmul(share[:, None], along)[:, 0] + w1 * (share @ length_2)[:, None]
            if ctx.needs_input_grad[2]:
                mixed = _summed_blocks(wide(weight), w1, taps, share)
                of_w2 = mixed.addcmul_(taps, (length_1 @ share)[:, None]).reshape(w2.shape)
        return None, of_w1, of_w2, None
