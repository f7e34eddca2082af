"""The nearest Kronecker product whose factors are themselves of low rank.

With the entries in another order a Kronecker product is one column times one row, so that with either factor held the
best other one is known: a product with the matrix, cut to its rank. The two take turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nerine.ops.kron import kron_rows
from nerine.ops.low_rank_fit import leading
from nerine.ops.precision import full_precision

__all__ = ["low_rank_kron"]

SWEEPS = 20
ENOUGH = 1e-6  # a sweep that gains less than this share of the squares is the last one
Halves = tuple[Tensor, ...]  # the factor itself, or an up and a down
Ranks = tuple[int | None, int | None]  # of w1 and of w2


@torch.no_grad()
def low_rank_kron(matrix: Tensor, shape: tuple[int, int], ranks: Ranks) -> tuple[Halves, Halves]:
    """Factors whose Kronecker product is near to `matrix` `[a·b, c·d, *k]`; w1 has the `shape` `[a, c]`.

    Where a rank is None the factor comes as it is, w2 as `[b, d·Πk]`; else as an up and a down of that rank. Never
    worse than the nearest Kronecker product with its factors cut down.
    """
    rows = kron_rows(matrix, shape)
    with full_precision(rows):
        best = leading(rows, 1, tolerance=1e-5)
        w1, w2 = best.u[:, 0] * best.s.sqrt(), best.vh[0] * best.s.sqrt()
        first = _Cut(w1, shape[0], ranks[0])
        second = _Cut(w2, matrix.shape[0] // shape[0], ranks[1])
        if ranks == (None, None) or not best.total:
            return first.halves, second.halves
        kept = float(2 * first.value.dot(rows @ second.value) - first.square * second.square)  # |matrix|² - |rest|²
        for _ in range(SWEEPS):
            found = _Cut(rows.mT @ first.value / first.square, second.rows, ranks[1])
            other = _Cut(rows @ found.value / found.square, first.rows, ranks[0])
            before, kept = kept, float(found.square * other.square)
            if kept <= before:
                break
            first, second = other, found
            if kept - before <= ENOUGH * best.total**2:
                break
        return first.halves, second.halves


class _Cut:
    """A factor, given as a vector, as the nearest one of its rank."""

    def __init__(self, vector: Tensor, rows: int, rank: int | None) -> None:
        flat = vector.reshape(rows, -1)
        self.rows, self.value = rows, vector
        self.halves: Halves = (flat,)
        if rank is not None:
            up, down = self.halves = leading(flat, rank, tolerance=1e-5).halves(rank)
            self.value = (up @ down).reshape(-1)
        self.square = self.value.dot(self.value)
