"""The nearest rotation: orthogonal blocks that turn one set of rows into another, also where each row has a factor.

W' = g ∘ (Rᵀ·W), block by block. Without factors it is one singular value decomposition of a block's size (Procrustes).
With them, the rows of the target are scaled to the turned ones and these are turned to them, in turns.
Source: Schönemann 1966.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nerine.ops.cayley import bounded, cayley, inverse_cayley
from nerine.ops.precision import full_precision

__all__ = ["nearest_turn", "nearest_turn_and_gain"]

SWEEPS = 200  # of matrices of a block's size
ENOUGH = 1e-12


@torch.no_grad()
def nearest_turn(before: Tensor, after: Tensor, limit: float = 0.0) -> Tensor:
    """Q `[n, s, s]` whose Cayley transforms R turn `before` to Rᵀ·before near to `after`, both `[n, s, m]`.

    |Q| over all blocks is at most `limit` (0: no limit). There is none for half turns: a block that would need one, and
    gains nothing without, is left alone.
    """
    with full_precision(before):
        return _quotient(before @ after.mT, limit)


@torch.no_grad()
def nearest_turn_and_gain(before: Tensor, after: Tensor, limit: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same with factors g `[n, s]` of the rows: g ∘ (Rᵀ·before) near to `after`; never worse than `nearest_turn`
    with the best factors for that."""
    with full_precision(before):
        cross, gram = before @ after.mT, before @ before.mT
        square = after.square().sum(-1)
        first, found, least = None, None, float("inf")
        scaled = torch.ones_like(square)
        for _ in range(SWEEPS):
            q = _quotient(cross * scaled[:, None, :], 0.0)
            left = _left(q, cross, gram, square)
            if found is not None and left >= least - ENOUGH * float(square.sum()):
                break
            first, found, least = q if first is None else first, q, left
            dot, _ = _along(q, cross, gram)
            scaled = torch.where(square > 0, dot / square, 1.0)
        assert first is not None
        assert found is not None
        q = min((bounded(q, limit) for q in (found, first)), key=lambda q: _left(q, cross, gram, square))
        dot, length = _along(q, cross, gram)
        return q, torch.where(length > 0, dot / length, 1.0)


def _left(q: Tensor, cross: Tensor, gram: Tensor, square: Tensor) -> float:
    """|after|² that the best factors leave."""
    dot, length = _along(q, cross, gram)
    return float((square - dot.square() / length.clamp_min(torch.finfo(length.dtype).tiny)).sum())


def _along(q: Tensor, cross: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """<Rᵀ·before, after> and |Rᵀ·before|² of each row `[n, s]`."""
    r = cayley(q) + torch.diag_embed(torch.ones_like(q[..., 0]))
    return (r * cross).sum(-2), (r * (gram @ r)).sum(-2)


def _quotient(cross: Tensor, limit: float) -> Tensor:
    """Q of the rotations for which trace(Rᵀ·cross) is largest."""
    size = torch.linalg.matrix_norm(cross)[:, None, None] * torch.finfo(cross.dtype).eps ** 0.75
    ones = torch.diag_embed(torch.ones_like(cross[..., 0]))
    u, _, vh = torch.linalg.svd(cross + size * ones)  # where the rows do not tell, nothing is turned
    sign = torch.sign(torch.linalg.det(u @ vh))
    u = torch.cat([u[..., :-1], u[..., -1:] * sign[:, None, None]], -1)
    q = inverse_cayley(u @ vh)
    is_turn = torch.isfinite(q).all(-1).all(-1)[:, None, None]
    q = bounded(torch.where(is_turn, (q - q.mT) / 2, 0.0), limit)
    gained = (cayley(q) * cross).sum((-1, -2))
    return torch.where(gained[:, None, None] >= 0, q, 0.0)
