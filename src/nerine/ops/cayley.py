"""Orthogonal blocks from free square ones: the Cayley transform and its series.

    Q = B - Bᵀ,    R = (I + Q)·(I - Q)⁻¹

Everything works with R - I, which is small where the blocks are, and runs in full precision whatever autocast says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nerine.ops.kernel_choice import standing_in
from nerine.ops.precision import full_precision

__all__ = ["bounded", "cayley", "inverse_cayley", "neumann", "skew", "skew_of_upper", "unit"]


def skew(blocks: Tensor) -> Tensor:
    """Q = B - Bᵀ of blocks `[..., s, s]`."""
    return blocks - blocks.mT


def skew_of_upper(upper: Tensor, size: int) -> Tensor:
    """Q `[n, s, s]` from the entries above the diagonal `[n, s·(s-1)/2]`, row by row."""
    number = torch.ones_like(upper[0, :1]).expand(size).cumsum(0) - 1  # made where `upper` is: no GPU waits for it
    before = number * (2 * size - 1 - number) / 2 - number - 1  # entries in the rows above, less those left out here
    place = (before[:, None] + number).clamp(0, upper.shape[1] - 1).long()
    q: Tensor = upper.index_select(1, place.flatten()).unflatten(1, (size, size)).triu(1)
    return q - q.mT


def bounded(q: Tensor, limit: float) -> Tensor:
    """`q` shrunk to a Frobenius norm, over all blocks, of at most `limit`; 0 is no limit."""
    if not limit:
        return q
    shrunk: Tensor = q * (limit / torch.linalg.vector_norm(q).clamp_min(limit))
    return shrunk


def unit(blocks: Tensor) -> Tensor:
    """The unit matrix `[s, s]` beside blocks `[..., s, s]`."""
    return torch.diag_embed(torch.ones_like(blocks.reshape(-1, blocks.shape[-1])[0]))


def cayley(q: Tensor) -> Tensor:
    """R - I of skew-symmetric `q` `[..., s, s]`; R is orthogonal."""
    kernel = standing_in("cayley", q)
    if kernel is not None:
        return kernel(q)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not q.numel():
        return _cayley(q)
    return _Cayley.apply(q)  # type: ignore[no-any-return]


def _cayley(q: Tensor) -> Tensor:
    with full_precision(q):  # I - Q is never singular: there is nothing to check, for which a GPU would have to wait
        turn: Tensor = torch.linalg.solve_ex(unit(q) - q, 2 * q)[0]
        return turn


class _Cayley(torch.autograd.Function):
    """dR = (I - Q)⁻¹·dQ·(I + R) and (I - Q)⁻¹ = (I + R)/2, so that the gradient takes two products and no solving."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        turn = _cayley(q)
        ctx.save_for_backward(turn)
        return turn

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (turn,) = ctx.saved_tensors
        with full_precision(grad):
            whole = (turn + 2 * unit(turn)).mT  # (I + R)ᵀ
            return torch.matmul(whole, torch.matmul(grad, whole)).mul_(0.5)


def inverse_cayley(r: Tensor) -> Tensor:
    """Q of orthogonal `r` `[..., s, s]`: (R - I)·(R + I)⁻¹; where R turns something by half a circle there is none, and
    a block may have entries that are not finite."""
    eye = unit(r)
    q: Tensor = torch.linalg.solve_ex(r + eye, r - eye)[0]
    return q


def neumann(q: Tensor, terms: int) -> Tensor:
    """R - I by the truncated series 2Q + 2Q² + … + 2Qᵐ⁻² + Qᵐ⁻¹ with m = `terms` of at least 4; nearly orthogonal.

    Source: the Cayley-Neumann form of Qiu et al. (OFTv2), arXiv:2506.19847, in the order of powers that PEFT uses.
    """
    with full_precision(q):
        turn, power = 2 * q, q
        for exponent in range(2, terms):
            power = power @ q
            turn = turn + (2 if exponent < terms - 1 else 1) * power
        return turn
