"""A low-rank change that acts on a weight's own inputs, fitted beside a plain one:   M ≈ W·a1·a2 + b1·b2

With the plain part held, the best A = a1·a2 of a rank is a reduced-rank regression: ridge regression on the weight,
seen along the leading directions of what it explains. The ridge keeps directions in which the weight is weak from being
bought with huge entries of A, which no half-precision file could hold. The two parts take turns.
Source: Izenman 1975 (reduced-rank regression); Mukherjee and Zhu 2011 (with a ridge).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nerine.ops.low_rank_fit import leading, shared_out
from nerine.ops.precision import full_precision, same_dtype

__all__ = ["InputSide", "beside_the_weight"]

SWEEPS = 12
ENOUGH = 1e-3  # a sweep that takes away less than this share of the error is the last one
RIDGE = 1e-3  # singular values of the weight below this share of the largest are used with restraint


class InputSide(NamedTuple):
    """a1 `[in, rank]`, a2 `[rank, in]`, b1 `[out, rank]` and b2 `[rank, in·Πk]`."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor


@torch.no_grad()
def beside_the_weight(weight: Tensor, matrix: Tensor, rank: int) -> InputSide:
    """The parts for which W·a1·a2 + b1·b2 is near to `matrix`; both `[out, in, *k]`, A the same at every tap.

    Never worse than b1·b2 alone.
    """
    with full_precision(weight):
        regression = _Regression(_by_tap(weight))
        up, down = leading(matrix.flatten(1), rank).halves(rank)
        a1 = weight.new_zeros((weight.shape[1], rank))
        best, least = InputSide(a1, a1.mT, up, down), float("inf")
        for _ in range(SWEEPS):
            rest = (matrix.flatten(1) - up @ down).reshape(matrix.shape)
            a1, a2 = regression.best(_by_tap(rest), rank)
            rest = rest - _through(weight, a1, a2)
            error = float(torch.linalg.vector_norm(rest))
            before, least = least, min(least, error)
            if error == least:
                best = InputSide(a1, a2, up, down)
            if error > before * (1 - ENOUGH):
                break
            up, down = leading((rest.flatten(1) + up @ down), rank).halves(rank)
        return best


def _by_tap(t: Tensor) -> Tensor:
    """`[out, in, *k]` as `[out·Πk, in]`."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def _through(weight: Tensor, a1: Tensor, a2: Tensor) -> Tensor:
    """W·a1·a2 on the input channels."""
    return ((weight.movedim(1, -1) @ a1) @ a2).movedim(-1, 1)


class _Regression:
    """Least squares on a weight `[n, in]` with a ridge, for any right side; its Gram matrix is taken apart once."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.is_tall = weight, weight.shape[0] > weight.shape[1]
        wider = weight if weight.device.type == "mps" else weight.double()
        squares, vectors = torch.linalg.eigh(wider.mT @ wider if self.is_tall else wider @ wider.mT)
        squares = squares.clamp_min(0)
        damped = squares + (RIDGE**2 * squares[-1] + torch.finfo(squares.dtype).tiny)
        self.vectors, self.over = same_dtype(vectors, weight), same_dtype(1 / damped, weight)[:, None]
        seen = 1 / damped if self.is_tall else squares / damped
        self.seen = same_dtype(seen.sqrt(), weight)[:, None]

    def best(self, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """a1 and a2 for which |W·a1·a2 - `right`|² + ridge·|a1·a2|² is least."""
        along = self.vectors.mT @ (self.weight.mT @ right if self.is_tall else right)
        directions = leading(self.seen * along, rank).vh
        a1 = self.vectors @ (self.over * (along @ directions.mT))
        a1 = a1 if self.is_tall else self.weight.mT @ a1
        missing = rank - len(directions)
        if missing:
            a1 = torch.cat([a1, a1.new_zeros((len(a1), missing))], 1)
            directions = torch.cat([directions, directions.new_zeros((missing, directions.shape[1]))])
        return shared_out(a1, directions)
