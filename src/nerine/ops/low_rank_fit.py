"""The best product of a given rank, or of the least rank within an error, without a whole decomposition.

Of a weight's change one wants a few dozen of its thousand singular triplets. A block Krylov space finds them with a few
products with thin matrices and knows how much it may still miss; where that is no gain, all of them are computed.
The same matrix always gives the same answer: the thin matrix that all begins with comes from a hash, not from chance.
Source: Musco and Musco 2015, arXiv:1504.05477 (block Krylov); Halko, Martinsson and Tropp 2011, arXiv:0909.4061.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nerine.errors import OptionError
from nerine.ops.exact_sums import double, has_gram, norm_of, rest_of, square_of
from nerine.ops.krylov import DULL, DUST, NEAR, Space
from nerine.ops.precision import full_precision, same_dtype, wide

__all__ = [
    "Leading",
    "Rule",
    "above",
    "above_share",
    "leading",
    "leading_until",
    "shared_out",
    "spectrum",
    "within",
]


class Leading(NamedTuple):
    """The leading singular triplets of a matrix M, and what they leave of it.

    `u` `[out, rank]` has orthonormal columns, `s` `[rank]` descends, `vh` `[rank, in]` has orthonormal rows. `total` is
    |M|, `rest` is |M - u·s·vh| (Frobenius both). `excess` estimates by what share `rest` is larger than what the best
    product of this rank leaves; 0 where `exact`: by the whole decomposition, or nothing but rounding is left.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    total: float
    rest: float
    excess: float
    exact: bool

    @property
    def rank(self) -> int:
        return len(self.s)

    @property
    def rests(self) -> Tensor:
        """What the first 0, 1, … `rank` triplets leave `[rank + 1]`, in fp64; summed from the small end, so that no
        large numbers cancel."""
        own = double(self.s).square().flip(0)
        from_end = torch.cat([own.new_full((1,), self.rest**2), own]).cumsum(0)
        return from_end.flip(0).sqrt()

    def cut(self, rank: int) -> Leading:
        """The first `rank` of them."""
        if rank >= self.rank:
            return self
        rest = float(self.rests[rank])
        excess = self.excess * (self.rest / rest) ** 2 if rest else 0.0  # at most all that is missed is missed here
        return self._replace(u=self.u[:, :rank], s=self.s[:rank], vh=self.vh[:rank], rest=rest, excess=excess)

    def halves(self, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """up `[out, rank]` and down `[rank, in]` with the singular values shared out between them; where a larger
        `rank` is asked for than there are, the rest is zero."""
        root = self.s.sqrt()
        up, down = self.u * root, root[:, None] * self.vh
        missing = 0 if rank is None else max(0, rank - self.rank)
        if missing:
            up = torch.cat([up, up.new_zeros((len(up), missing))], 1)
            down = torch.cat([down, down.new_zeros((missing, down.shape[1]))])
        return up, down


def shared_out(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of `up` `[out, rank]` and `down` `[rank, in]`, each column as long as its row."""
    column, row = torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)
    tiny = torch.finfo(up.dtype).tiny
    root = torch.where((column > 0) & (row > 0), (row / column.clamp_min(tiny)).sqrt(), 1.0)
    return up * root, down / root[:, None]


Rule = Callable[[Leading], int | None]
"""How many of the triplets found so far are enough; None where more are needed to tell."""


# -- what can be asked -----------------------------------------------------------------------------------------------
@torch.no_grad()
def leading(matrix: Tensor, rank: int, *, tolerance: float = 1e-3) -> Leading:
    """The leading `rank` singular triplets of `matrix` `[out, in]`, in its number format (at least fp32).

    What they leave is at most about `tolerance` larger than the best product of this rank leaves. A rank above the
    smaller side gives as many as there are.
    Raises:
        OptionError: a rank below one, or entries that are no numbers.
    """
    if rank < 1:
        raise OptionError(f"rank must be at least 1, got {rank}")
    matrix, total = _checked(matrix)
    with full_precision(matrix):
        side = min(matrix.shape)
        if 6 * (rank + 2) <= side and total:  # measured: beyond that, all of them are as fast
            found = _by_krylov(matrix, rank, tolerance, total)
            if found is not None:
                return found
        return _exact(matrix, min(rank, side), total)


@torch.no_grad()
def leading_until(matrix: Tensor, enough: Rule, *, first: int = 16, tolerance: float = 1e-3) -> Leading:
    """The least rank that `enough` is content with: `first` triplets, then twice as many, until it says how many.

    Raises:
        OptionError: entries that are no numbers.
    """
    side = min(matrix.shape)
    rank = max(1, min(first, side))
    while True:
        found = leading(matrix, rank, tolerance=tolerance)
        kept = enough(found)
        if kept is not None or rank == side:
            return found if kept is None else found.cut(kept)
        rank = min(2 * rank, side)


def within(error: float) -> Rule:
    """As many as leave out at most `error` of |M|. A share e of the energy (the squares) is `within(√(1 - e))`."""

    def enough(found: Leading) -> int | None:
        good = (found.rests <= error * found.total).nonzero()
        return int(good[0]) if len(good) else None

    return enough


def above(value: float) -> Rule:
    """As many as have a singular value larger than `value`."""
    return lambda found: _count(found, value)


def above_share(share: float) -> Rule:
    """As many as have a singular value larger than `share` of the largest."""
    return lambda found: _count(found, share * float(found.s[0]))


def _count(found: Leading, value: float) -> int | None:
    count = int((found.s > value).sum())
    return count if count < found.rank else None


@torch.no_grad()
def spectrum(matrix: Tensor) -> Tensor:
    """All singular values of `matrix` `[out, in]`, descending, without their vectors."""
    matrix, _ = _checked(matrix)
    with full_precision(matrix):
        if has_gram(matrix):
            values = torch.linalg.eigvalsh(_gram(matrix)).flip(0).clamp_min(0).sqrt()
            if float(values[-1]) >= DULL * float(values[0]):
                return same_dtype(values, matrix)
        found: Tensor = torch.linalg.svdvals(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT)
        return found


# -- exact -----------------------------------------------------------------------------------------------------------
def _exact(matrix: Tensor, rank: int, total: float) -> Leading:
    """By the whole decomposition: of the Gram matrix in fp64 where fp32 loses nothing by that, else of the matrix."""
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK is several times faster on tall ones
        return _flipped(_exact(matrix.mT, rank, total))
    if has_gram(matrix):
        squares, vectors = torch.linalg.eigh(_gram(matrix))
        values = squares.flip(0).clamp_min(0).sqrt()
        if float(values[rank - 1]) >= DULL * float(values[0]) > 0:
            v = same_dtype(vectors.flip(1)[:, :rank], matrix)
            s = same_dtype(values[:rank], matrix)
            return _settled(matrix, (matrix @ v) / s, s, v.mT.contiguous(), total, 0.0, values[rank:])
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _settled(matrix, u[:, :rank], s[:rank], vh[:rank], total, 0.0, s[rank:])


def _gram(matrix: Tensor) -> Tensor:
    """M·Mᵀ of the smaller side, in fp64, a part of the longer one at a time."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    side = matrix.shape[0]
    gram = double(matrix.new_zeros((side, side)))
    for part in matrix.split(max(1, (1 << 22) // side), 1):
        wider = part.double()
        gram.addmm_(wider, wider.mT)
    return gram


# -- by a block Krylov space -----------------------------------------------------------------------------------------
def _by_krylov(matrix: Tensor, rank: int, tolerance: float, total: float) -> Leading | None:
    """The triplets, or None where the space would grow too large to be worth it."""
    if matrix.shape[0] > matrix.shape[1]:
        turned = _by_krylov(matrix.mT, rank, tolerance, total)
        return None if turned is None else _flipped(turned)
    space = Space(matrix, 16 * math.ceil((rank / 2 + 8) / 16))  # products of 17 columns take as long as of 32
    got: list[float] = []  # energy of the leading `rank`, one more time for each block
    block = space.fresh()
    while space.size + space.width <= matrix.shape[0] * 5 // 8:
        if not space.add(block) and not space.add(space.fresh()):  # nothing of the matrix is outside
            space.fill(rank)
            return _settled(matrix, *space.triplets(rank), total, 0.0, None)
        if space.size >= rank:
            got.append(space.energy(rank))
            missing = _missing(got)
            left = math.inf if missing is None else space.left(rank, got[-1], total)
            if missing is not None and (not left or missing <= 2 * tolerance * left):
                found = space.triplets(rank)
                missed = space.missed(*found) if left else None
                if missed is None:
                    return _settled(matrix, *found, total, missing, None)
                block, got = missed, got[-1:]
                continue
        block = space.next()
    return None


def _missing(got: list[float]) -> float | None:
    """What the energies, one for each step, still lack: those gains that follow the last one, which shrink as it did,
    and twice that, for they may shrink more slowly."""
    if len(got) < 2:
        return None
    gain = max(got[-1] - got[-2], 0.0)
    if len(got) < 3:
        return 3 * gain
    before = got[-2] - got[-3]
    shrinks = min(max(gain / before, 0.1), 0.95) if before > 0 else 0.1
    return 2 * gain * shrinks / (1 - shrinks)


# -- shared ----------------------------------------------------------------------------------------------------------
def _settled(
    matrix: Tensor, u: Tensor, s: Tensor, vh: Tensor, total: float, missing: float, others: Tensor | None
) -> Leading:
    """The finding with what it leaves: from the `others` of the singular values where all are known, else by
    subtraction, unless nearly all would cancel. `missing` is the estimate of the squares that are not found."""
    eps = torch.finfo(matrix.dtype).eps
    left = total**2 - square_of(s) if others is None else square_of(others)
    rest = math.sqrt(left) if left > NEAR * eps * total**2 else rest_of(matrix, u, s, vh)
    if others is not None or rest <= DUST * eps * total:
        return Leading(u, s, vh, total, rest, 0.0, True)
    return Leading(u, s, vh, total, rest, missing / (2 * rest**2), False)


def _flipped(found: Leading) -> Leading:
    """That of the transpose."""
    return found._replace(u=found.vh.mT.contiguous(), vh=found.u.mT.contiguous())


def _checked(matrix: Tensor) -> tuple[Tensor, float]:
    """The matrix in at least fp32, and its norm."""
    if matrix.dim() != 2 or not min(matrix.shape):
        raise OptionError(f"expected a matrix [out, in], got the shape {list(matrix.shape)}; flatten the kernel first")
    matrix = wide(matrix)
    total = norm_of(matrix)
    if not math.isfinite(total):
        raise OptionError(
            "the matrix has entries that are no numbers (NaN or infinite); take out that layer, or look at the files "
            "that its change was computed from"
        )
    return matrix, total
