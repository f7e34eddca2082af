"""A block Krylov space of a matrix: orthonormal directions that its leading singular vectors soon lie in.

It begins with a thin matrix that comes from a hash, not from chance, so that the same matrix always gives the same
space. Source: Musco and Musco 2015, arXiv:1504.05477.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nerine.ops.exact_sums import double, has_gram, rest_of
from nerine.ops.precision import same_dtype

__all__ = ["DULL", "DUST", "NEAR", "PROBES", "Space", "sketch"]

DUST = 64  # a remainder of so many units of rounding is nothing but that
NEAR = 1e4  # a square of so many units of rounding, gained by subtraction, is not to be trusted
PROBES = 4  # columns that look for what was missed
DULL = 1e-4  # singular values below this share of the largest are lost in the squares of a Gram matrix


class Space:
    """Orthonormal `q` `[out, size]` that grows by blocks, `z` = qᵀ·M `[size, in]` and `square` = z·zᵀ, these in fp64.

    The matrix always stands on that side of a product on which its rows lie one after the other in memory.
    """

    def __init__(self, matrix: Tensor, width: int) -> None:
        self.matrix, self.width = matrix, width
        self.in_rows = matrix.is_contiguous()
        self.q = matrix.new_zeros((matrix.shape[0], 0))
        self.z: list[Tensor] = []  # block by block
        self.square = double(matrix.new_zeros((0, 0)))
        self.last = matrix.new_zeros((0, matrix.shape[1]))
        self.probe, self.answer = self.q, self.q  # a thin matrix that the space knows nothing of, and M times that
        self.sketches = 0

    @property
    def size(self) -> int:
        return self.q.shape[1]

    def _forth(self, z: Tensor) -> Tensor:
        """M·zᵀ `[out, k]` of `z` `[k, in]`."""
        return self.matrix @ z.mT if self.in_rows else (z @ self.matrix.mT).mT

    def _back(self, q: Tensor) -> Tensor:
        """qᵀ·M `[k, in]` of `q` `[out, k]`."""
        return q.mT @ self.matrix if self.in_rows else (self.matrix.mT @ q).mT

    def fresh(self) -> Tensor:
        """M times a thin matrix that has nothing to do with it."""
        self.sketches += 1
        is_first = self.sketches == 1
        thin = sketch(self.matrix, self.width + PROBES * is_first, self.matrix.shape[1], self.sketches)
        both = self._forth(thin)
        if not is_first:
            return both
        # the last few columns are set aside, to look for what the others did not see
        self.probe, self.answer = thin[-PROBES:], both[:, -PROBES:]
        return both[:, :-PROBES]

    def next(self) -> Tensor:
        """M·Mᵀ times the last block."""
        return self._forth(self.last)

    def add(self, block: Tensor) -> bool:
        """Take in what of the columns of `block` is outside; False where there is nothing."""
        scale = float(torch.linalg.vector_norm(block))
        block = block - self.q @ (self.q.mT @ block)
        if float(torch.linalg.vector_norm(block)) <= 8 * torch.finfo(block.dtype).eps * scale:
            return False
        new, _ = torch.linalg.qr(block)
        new = new - self.q @ (self.q.mT @ new)
        new = new[:, torch.linalg.vector_norm(new, dim=0) > 0.5]  # the others were rounding
        if not new.shape[1]:
            return False
        new, _ = torch.linalg.qr(new)
        self.last = self._back(new)
        self.q = torch.cat([self.q, new], 1)
        self.z.append(double(self.last))
        cross = torch.cat([z @ self.z[-1].mT for z in self.z])
        self.square = torch.cat([torch.cat([self.square, cross[: -new.shape[1]].mT]), cross], 1)
        return True

    def fill(self, rank: int) -> None:
        """Grow to `rank` by directions that the matrix does not have: their singular values are zero."""
        while self.size < rank:
            self.sketches += 1
            self.add(sketch(self.matrix, self.matrix.shape[0], self.width, self.sketches))

    def energy(self, rank: int) -> float:
        """The squares of the leading `rank` singular values of the part of M inside."""
        return float(torch.linalg.eigvalsh(self.square)[-rank:].sum())

    def left(self, rank: int, energy: float, total: float) -> float:
        """The squares outside of the leading `rank`: by subtraction, unless nearly all would cancel; zero where they
        are nothing but rounding."""
        left = total**2 - energy
        if left > NEAR * torch.finfo(self.matrix.dtype).eps * total**2:
            return left
        rest = rest_of(self.matrix, *self.triplets(rank))
        return rest**2 if rest > DUST * torch.finfo(self.matrix.dtype).eps * total else 0.0

    def triplets(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The leading singular triplets of the part of M inside."""
        if has_gram(self.matrix):
            squares, vectors = torch.linalg.eigh(self.square)
            s = squares.flip(0)[:rank].clamp_min(0).sqrt()
            if float(s[-1]) >= DULL * float(s[0]) > 0:
                turn = vectors.flip(1)[:, :rank] / s
                vh = turn.mT @ torch.cat(self.z)
                return self.q @ same_dtype(turn * s, self.q), same_dtype(s, self.q), same_dtype(vh, self.q)
        p, r = torch.linalg.qr(torch.cat(self.z).mT)
        a, s, bh = torch.linalg.svd(r)
        u, vh = double(self.q) @ bh[:rank].mT, (p @ a[:, :rank]).mT
        return same_dtype(u, self.q), same_dtype(s[:rank], self.q), same_dtype(vh, self.q)

    def missed(self, u: Tensor, s: Tensor, vh: Tensor) -> Tensor | None:
        """Directions of the remainder that are stronger than the weakest of the triplets; None where there are none."""
        seen, _ = torch.linalg.qr(self.answer - (u * s) @ (vh @ self.probe.mT))
        remainder = self._back(seen) - (seen.mT @ u * s) @ vh
        return seen if float(torch.linalg.matrix_norm(remainder, 2)) > 1.01 * float(s[-1]) else None


def sketch(like: Tensor, rows: int, columns: int, salt: int) -> Tensor:
    """Numbers in [-1, 1) `[rows, columns]` that look like chance, from an integer hash of their place: the same on
    every device. Source: the rounds of Wellons' 32-bit hashes, with multipliers below 2³¹."""
    x = like.new_ones((rows * columns,), dtype=torch.int64).cumsum(0) + (salt << 24)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x31848BAB)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) >> 8  # 24 bits, which fp32 holds exactly
    return same_dtype(x, like).reshape(rows, columns) * 2.0**-23 - 1.0
