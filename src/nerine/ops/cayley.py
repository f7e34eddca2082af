"""Orthogonal blocks from free square ones: the Cayley transform and its series.

    Q = B - Bᵀ,    R = (I + Q)·(I - Q)⁻¹

Everything works with R - I, which is small where the blocks are, and runs in full precision whatever autocast says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nerine.ops.precision import full_precision

__all__ = ["bounded", "cayley", "inverse_cayley", "neumann", "skew", "skew_of_upper"]


def skew(blocks: Tensor) -> Tensor:
    """Q = B - Bᵀ of blocks `[..., s, s]`."""
    return blocks - blocks.mT


def skew_of_upper(upper: Tensor, size: int) -> Tensor:
    """Q `[n, s, s]` from the entries above the diagonal `[n, s·(s-1)/2]`, row by row."""
    rows, columns = torch.triu_indices(size, size, 1)
    q = upper.new_zeros((upper.shape[0], size, size))
    q[:, rows, columns] = upper
    return q - q.mT


def bounded(q: Tensor, limit: float) -> Tensor:
    """`q` shrunk to a Frobenius norm, over all blocks, of at most `limit`; 0 is no limit."""
    if not limit:
        return q
    shrunk: Tensor = q * (limit / torch.linalg.vector_norm(q).clamp_min(limit))
    return shrunk


def cayley(q: Tensor) -> Tensor:
    """R - I of skew-symmetric `q` `[..., s, s]`; R is orthogonal."""
    with full_precision(q):
        eye = torch.diag_embed(torch.ones_like(q[..., 0]))
        turn: Tensor = torch.linalg.solve(eye - q, 2 * q)
        return turn


def inverse_cayley(r: Tensor) -> Tensor:
    """Q of orthogonal `r` `[..., s, s]`: (R - I)·(R + I)⁻¹; where R turns something by half a circle there is none, and
    a block may have entries that are not finite."""
    eye = torch.diag_embed(torch.ones_like(r[..., 0]))
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
