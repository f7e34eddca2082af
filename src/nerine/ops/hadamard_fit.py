"""The nearest entrywise product of two low-rank products, (a1·b1) ∘ (a2·b2), by least squares in turns.

With the second half held, each row of a1 and each column of b1 is the solution of a small least-squares problem of its
own. It starts with a first half that is one everywhere and a second that is the best low-rank product, so that the
result is never worse than that. A matrix that may well be such a product is tried from several starts, for from one
alone the turns may end in a place that is only the best around.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nerine.ops.krylov import sketch
from nerine.ops.low_rank_fit import leading, shared_out
from nerine.ops.precision import full_precision

__all__ = ["nearest_hadamard"]

SWEEPS = 12
ENOUGH = 1e-4  # a sweep that takes away less than this share of the error is the last one
STARTS = 10  # where the matrix has a rank that such a product would have
SMALL = 4096  # entries of a matrix that is cheap to try often
FEW = 4  # up to this rank it is worth to look for the very product
CHUNK = 1 << 22  # entries of the largest temporary tensors


class _Halves(NamedTuple):
    """a `[out, rank]` and b `[rank, in]` of both halves, and the error |M - (a1·b1) ∘ (a2·b2)|."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor
    error: float


@torch.no_grad()
def nearest_hadamard(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a1 `[out, rank]`, b1 `[rank, in]`, a2 and b2 for which (a1·b1) ∘ (a2·b2) is near to `matrix` `[out, in]`.

    Never worse than the best product of this rank. What is such a product of rank 1 is found again, one of rank 2
    nearly always.
    """
    with full_precision(matrix):
        total = float(torch.linalg.vector_norm(matrix))
        best: _Halves | None = None
        for start in _starts(matrix, rank):
            found = _in_turns(matrix, start)
            best = found if best is None or found.error < best.error else best
            if best.error <= 1e-2 * total:  # it is that product, and the turns lead to it
                best = _in_turns(matrix, best, 5 * SWEEPS)
                break
        assert best is not None
        return _balanced(best)


def _starts(matrix: Tensor, rank: int) -> Iterator[_Halves]:
    """The surest start first; others only for a matrix that may well be such a product: of rank r² at most."""
    up, down = leading(matrix, rank).halves(rank)
    ones = torch.zeros_like(up)
    ones[:, 0] = 1
    yield _with_error(matrix, ones, _rows_of_ones(down, 1), up, down)
    if not 1 < rank <= FEW:
        return
    whole = leading(matrix, min(rank**2, *matrix.shape))
    if whole.rest > 1e-3 * whole.total or (rank**2 >= min(matrix.shape) and matrix.numel() > SMALL):
        return
    root = matrix.abs().sqrt()
    yield _with_error(matrix, *leading(root, rank).halves(rank), *leading(root * matrix.sign(), rank).halves(rank))
    for salt in range(2, STARTS):
        if salt % 2:
            yield _with_error(matrix, ones, _rows_of_ones(down, salt), up, down)
        else:
            a, b = (sketch(matrix, n, 2 * rank, 100 * salt + i) for i, n in enumerate(matrix.shape))
            size = (whole.total / math.sqrt(matrix.numel())) ** 0.25
            a, b = a * size, b.mT * size
            yield _with_error(matrix, a[:, :rank], b[:rank], a[:, rank:], b[rank:])


def _rows_of_ones(like: Tensor, salt: int) -> Tensor:
    """A row of ones above rows of anything."""
    rows = sketch(like, len(like), like.shape[1], salt)
    rows[0] = 1
    return rows


def _in_turns(matrix: Tensor, best: _Halves, sweeps: int = SWEEPS) -> _Halves:
    """Least squares for one factor after the other, until that gains nothing more."""
    for _ in range(sweeps):
        a1, b1, a2, b2, error = best
        if not error:
            break
        held = a1 @ b1
        a2 = _rows(matrix, held, b2, a2)
        b2 = _rows(matrix.mT, held.mT, a2.mT, b2.mT).mT
        held = a2 @ b2
        a1 = _rows(matrix, held, b1, a1)
        b1 = _rows(matrix.mT, held.mT, a1.mT, b1.mT).mT
        found = _with_error(matrix, a1, b1, a2, b2)
        if not found.error < error:
            break
        best = found
        if found.error > (1 - ENOUGH) * error:
            break
    return best


def _rows(matrix: Tensor, held: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """The rows of a for which (a·b) ∘ held is nearest to `matrix`; those of `before` where nothing tells.

    The weight that pulls to the rows before is tiny: it makes every problem solvable and never raises the error.
    """
    rank = len(b)
    squares = matrix.new_empty((len(matrix), rank, rank))
    rows, columns = max(1, CHUNK // rank**2), max(1, CHUNK // rank**2)
    for first in range(0, len(matrix), rows):
        some = slice(first, first + rows)
        part = matrix.new_zeros((len(squares[some]), rank**2))
        for weights, own in zip(held[some].split(columns, 1), b.split(columns, 1), strict=True):
            pairs = (own[:, None] * own[None]).flatten(0, 1)
            part.addmm_(weights.square(), pairs.mT)
        squares[some] = part.reshape(-1, rank, rank)
    wanted = (held * matrix) @ b.mT
    diagonal = squares.diagonal(dim1=1, dim2=2)
    pull = 1e-2 * math.sqrt(torch.finfo(matrix.dtype).eps) * diagonal.mean() + torch.finfo(matrix.dtype).tiny
    diagonal += pull
    solution: Tensor = torch.linalg.solve(squares, wanted + pull * before)
    return solution


def _with_error(matrix: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> _Halves:
    rest = torch.addcmul(matrix, a1 @ b1, a2 @ b2, value=-1)
    return _Halves(a1, b1, a2, b2, float(torch.linalg.vector_norm(rest)))


def _balanced(found: _Halves) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same product, both halves of one size, and in each every column as long as its row."""
    (a1, b1), (a2, b2) = shared_out(found.a1, found.b1), shared_out(found.a2, found.b2)
    one, two = (float(torch.linalg.vector_norm(a @ b)) for a, b in ((a1, b1), (a2, b2)))
    root = (two / one) ** 0.25 if one and two else 1.0
    return a1 * root, b1 * root, a2 / root, b2 / root
