"""Arithmetic on low-rank products that never builds them: singular values, the best product of fewer ranks, sums.

up·down with up `[out, rank]` and down `[rank, n]`: up = Q·R and downᵀ = P·S, and the singular values of the product
are those of R·Sᵀ, which has the size of the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nerine.ops.precision import full_precision, wide

__all__ = [
    "Spectrum",
    "balanced",
    "dense_spectrum",
    "halves",
    "kron_factors",
    "kron_spectrum",
    "least_rank",
    "loss",
    "spectrum",
    "split_matrix",
    "stacked",
]


class Spectrum(NamedTuple):
    """u `[out, k]`, s `[k]` (largest first) and vh `[k, n]` whose product u·s·vh is a matrix."""

    u: Tensor
    s: Tensor
    vh: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of all squares, 0-d, in fp64."""
        return squares(self.s).sum()


def squares(s: Tensor) -> Tensor:
    """Squares of singular values: in fp32 those of a small change would be zero."""
    return s.double().square() if s.device.type != "mps" else s.square()


@torch.no_grad()
def spectrum(up: Tensor, down: Tensor) -> Spectrum:
    """Singular values and vectors of up·down; as many as the rank, or as the smaller side has."""
    up, down = wide(up), wide(down)
    with full_precision(up):
        q, r = torch.linalg.qr(up)
        p, s = torch.linalg.qr(down.mT)
        u, values, vh = torch.linalg.svd(r @ s.mT, full_matrices=False)
        return Spectrum(q @ u, values, vh @ p.mT)


@torch.no_grad()
def dense_spectrum(matrix: Tensor) -> Spectrum:
    """That of a matrix that has no smaller form."""
    with full_precision(matrix):
        return Spectrum(*torch.linalg.svd(wide(matrix), full_matrices=False))


@torch.no_grad()
def kron_spectrum(one: Spectrum, two: Spectrum, inputs: int, most: int | None = None) -> Spectrum:
    """The `most` leading singular values and vectors of w1 ⊗ w2 from those of w1 and of w2 `[b, d·Πk]`, which has
    `inputs` = d input channels: all products of a value of each, and none is built that is not asked for."""
    both = (one.s[:, None] * two.s[None]).flatten()
    values, index = torch.sort(both, descending=True, stable=True)
    values, index = values[:most], index[:most]
    i, j = index // len(two.s), index % len(two.s)
    u = (one.u[:, None, i] * two.u[None, :, j]).flatten(0, 1)
    fine = two.vh[j].reshape(len(j), 1, inputs, -1)
    vh = (one.vh[i][:, :, None, None] * fine).flatten(1)
    return Spectrum(u, values, vh)


def kron_factors(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], inputs: int) -> tuple[Tensor, Tensor]:
    """up and down of (u1·v1) ⊗ (u2·v2), whose rank is the product of theirs: (u1 ⊗ u2)·(v1 ⊗ v2). v2 `[r2, d·Πk]` has
    `inputs` = d input channels."""
    (u1, v1), (u2, v2) = one, two
    up = (u1[:, None, :, None] * u2[None, :, None]).reshape(len(u1) * len(u2), -1)
    fine = v2.reshape(1, len(v2), 1, inputs, -1)
    return up, (v1[:, None, :, None, None] * fine).reshape(up.shape[1], -1)


@torch.no_grad()
def split_matrix(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """up and down whose product is `matrix`, of its numerical rank; where that is full, itself and a unit matrix."""
    found = dense_spectrum(matrix)
    rank = int((found.s > found.s[:1] * torch.finfo(found.s.dtype).eps * max(matrix.shape)).sum())
    if rank < min(matrix.shape):
        return halves(found, max(rank, 1))
    matrix = wide(matrix)
    ones = torch.diag(torch.ones_like(found.s))
    return (ones, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, ones)


def halves(found: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """up `[out, rank]` and down `[rank, n]` with the leading values shared out between them, zeros beyond those that
    there are. The first ranks of it are the best product of that many."""
    root = found.s[:rank].sqrt()
    up, down = found.u[:, :rank] * root, root[:, None] * found.vh[:rank]
    if (missing := rank - len(root)) > 0:
        up = torch.cat([up, up.new_zeros((up.shape[0], missing))], 1)
        down = torch.cat([down, down.new_zeros((missing, down.shape[1]))])
    return up, down


@torch.no_grad()
def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with both factors of a size, rank by rank, so that half precision holds them; exactly the same,
    for they are multiplied by powers of two."""
    sizes = [torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)]
    power = ((sizes[1].log2() - sizes[0].log2()) / 2).round()
    factor = torch.where(power.isfinite(), power, torch.zeros_like(power)).clamp(-60, 60).exp2()
    return up * factor, down / factor[:, None]


def stacked(terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One product that is the sum of several: ups side by side, downs one above the other."""
    return torch.cat([up for up, _ in terms], 1), torch.cat([down for _, down in terms])


def least_rank(s: Tensor, error: float) -> int:
    """The least rank (one at least) that leaves out no more than `error` of the size, of which `s` has all values."""
    left = squares(s).flip(0).cumsum(0).flip(0)  # of the values from each on
    kept = int((left > error**2 * left[:1]).sum())
    return max(1, kept)


def loss(s: Tensor, rank: int) -> float:
    """The share of the size that the values beyond `rank` have: |rest| / |all|, zero where there is nothing."""
    own = squares(s)
    total = float(own.sum())
    return (float(own[rank:].sum()) / total) ** 0.5 if total else 0.0
