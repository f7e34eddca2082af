"""The change W' - W of one layer as a matrix `[out, in·Πk]`, kept in the form in which it is smallest, and what can be
asked of it: singular values, leading directions, products with another change.

A low-rank change is never multiplied out, a Kronecker product stays in its two factors; whatever has no such form is
dense. Sums run in fp64: distances of nearly equal changes are differences of nearly equal numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nerine.algorithms import DoRA, GLoRA, LoHa, LoKr, LowRank, Params, Sandwich
from nerine.files.checkpoint import Record
from nerine.ops.khatri_rao import paired_columns, paired_rows
from nerine.ops.precision import wide
from nerine.ops.tucker import tucker

__all__ = ["Change", "Dense", "Kron", "Seen", "UpDown", "change_of", "experts_of", "inner", "turn_size"]

SILENT = 1e-6  # singular values below this share of the largest are rounding of the factors, and no direction
CHUNK = 256  # rows or columns of an identity that are turned at a time


class Directions(NamedTuple):
    """The leading singular directions: outputs `[out, k]`, values `[k]`, inputs `[n, k]`."""

    outputs: Tensor
    values: Tensor
    inputs: Tensor


class Change(ABC):
    """A matrix `[out, n]`."""

    shape: tuple[int, int]

    @property
    @abstractmethod
    def squares(self) -> Tensor:
        """Squares of its singular values, largest first, as many as its form can have."""

    @abstractmethod
    def leading(self, count: int) -> Directions:
        """Its `count` leading directions, or as many as are above rounding."""

    @abstractmethod
    def times(self, right: Tensor) -> Tensor:
        """This matrix times `right` `[n, k]`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All of its entries."""

    @property
    def norm(self) -> float:
        """The root of the sum of the squares of all entries."""
        return float(self.squares.sum().sqrt())

    @property
    def rank(self) -> int:
        """How many of its singular values are above rounding."""
        squares = self.squares
        return int((squares > SILENT**2 * squares[:1]).sum()) if len(squares) else 0


class UpDown(Change):
    """up `[out, rank]` times down `[rank, n]`, of which only matrices of the rank's size are built."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        self.up, self.down = accurate(up), accurate(down)
        self.shape = (up.shape[0], down.shape[1])

    @cached_property
    def _root(self) -> Tensor:
        """L with L·Lᵀ = down·downᵀ: up·L has the singular values of the product, and its outputs."""
        values, vectors = torch.linalg.eigh(self.down @ self.down.mT)
        root: Tensor = vectors * values.clamp_min(0).sqrt()
        return root

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Squares of the singular values and directions in the space of the rank, largest first."""
        values, vectors = torch.linalg.eigh(self._root.mT @ (self.up.mT @ self.up) @ self._root)
        return values.clamp_min(0).flip(0), vectors.flip(1)

    @property
    def squares(self) -> Tensor:
        return self._eigen[0][: min(self.shape)]

    def leading(self, count: int) -> Directions:
        count = min(count, self.rank)
        values = self.squares[:count].sqrt()
        outputs = self.up @ (self._root @ self._eigen[1][:, :count]) / values
        return Directions(outputs, values, self.down.mT @ (self.up.mT @ outputs) / values)

    def times(self, right: Tensor) -> Tensor:
        return self.up @ (self.down @ right)

    def dense(self) -> Tensor:
        return self.up @ self.down


class Dense(Change):
    """All entries, where there is no smaller form."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = accurate(matrix)
        self.shape = (matrix.shape[0], matrix.shape[1])

    @cached_property
    def _gram(self) -> Tensor:
        """Of the smaller side."""
        m = self.matrix
        return m.mT @ m if m.shape[0] > m.shape[1] else m @ m.mT

    @cached_property
    def squares(self) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(self._gram)
        return values.clamp_min(0).flip(0)

    @cached_property
    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.matrix))

    def leading(self, count: int) -> Directions:
        _, vectors = torch.linalg.eigh(self._gram)
        count = min(count, self.rank)
        first = vectors.flip(1)[:, :count]
        values = self.squares[:count].sqrt()
        if self.shape[0] > self.shape[1]:
            return Directions(self.matrix @ first / values, values, first)
        return Directions(first, values, self.matrix.mT @ first / values)

    def times(self, right: Tensor) -> Tensor:
        return self.matrix @ right

    def dense(self) -> Tensor:
        return self.matrix


class Kron(Change):
    """w1 `[a, c]` ⊗ w2 `[b, m]`: its singular values are all products of theirs, its directions those of the pairs."""

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        self.w1, self.w2 = Dense(w1), Dense(w2)
        self.shape = (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1])

    @cached_property
    def squares(self) -> Tensor:
        both = self.w1.squares[:, None] * self.w2.squares[None]
        return both.flatten().sort(descending=True).values

    def leading(self, count: int) -> Directions:
        one, two = self.w1.leading(count), self.w2.leading(count)
        both = (one.values[:, None] * two.values[None]).flatten()
        count = min(count, self.rank)
        values, index = both.sort(descending=True)
        i, j = index[:count] // len(two.values), index[:count] % len(two.values)
        return Directions(
            paired_rows_at(one.outputs, two.outputs, i, j),
            values[:count],
            paired_rows_at(one.inputs, two.inputs, i, j),
        )

    def times(self, right: Tensor) -> Tensor:
        w1, w2, k = self.w1.matrix, self.w2.matrix, right.shape[1]
        fine = torch.einsum("bm,cmk->cbk", w2, right.reshape(w1.shape[1], w2.shape[1], k))
        return torch.einsum("ac,cbk->abk", w1, fine).reshape(-1, k)

    def dense(self) -> Tensor:
        return torch.kron(self.w1.matrix, self.w2.matrix)


def paired_rows_at(one: Tensor, two: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Kronecker products `[a·b, k]` of the columns i of `one` `[a, ...]` with the columns j of `two` `[b, ...]`."""
    return (one[:, None, i] * two[None, :, j]).flatten(0, 1)


def accurate(t: Tensor) -> Tensor:
    """`t` in fp64 where the device has it."""
    return wide(t) if t.device.type == "mps" else t.to(torch.float64)


def inner(a: Change, b: Change) -> float:
    """The sum of the products of their entries, through whichever factors there are."""
    if isinstance(a, UpDown):
        a, b = b, a
    if isinstance(b, UpDown):
        return float((a.times(b.down.mT) * b.up).sum())
    if isinstance(a, Kron) and isinstance(b, Kron) and a.w1.shape == b.w1.shape and a.w2.shape == b.w2.shape:
        return float((a.w1.matrix * b.w1.matrix).sum() * (a.w2.matrix * b.w2.matrix).sum())
    return float((a.dense() * b.dense()).sum())


# -- from the tensors of an adapter ------------------------------------------------------------------------------------
class Seen(NamedTuple):
    """The change of a layer, or as much of it as can be known: `lacking` says what it is, where it is not all."""

    change: Change | None
    lacking: str = ""


def experts_of(record: Record) -> list[Record]:
    """The record itself, or one for each expert of a layer that holds several."""
    if not record.site.experts:
        return [record]
    site = replace(record.site, experts=0)
    tensors = record.params.tensors
    return [
        Record(record.algorithm, site, record.params.filled(t[i] for t in tensors.values()))
        for i in range(record.site.experts)
    ]


@torch.no_grad()
def change_of(record: Record, weight: Tensor | None = None) -> Seen:
    """The change that an adapter makes; `weight` `[out, in, *k]` is that of its layer, where it is at hand.

    Without it, a change that depends on it is known in part (a DoRA without its magnitudes) or not at all (a rotation).
    """
    algorithm, p, site = record.algorithm, record.params, record.site
    if isinstance(algorithm, DoRA):
        if weight is not None:
            return Seen(_flat(algorithm.weight_deviation(p, wide(weight))))
        within = change_of(replace(record, algorithm=algorithm.inner, params=p.without("magnitude")))
        return Seen(within.change, within.lacking or "without its magnitudes, which need the base")
    if isinstance(algorithm, GLoRA):
        return _of_glora(p, weight)
    if isinstance(algorithm, LowRank):
        return _of_low_rank(algorithm, p)
    if isinstance(algorithm, LoKr):
        w1, w2 = _factor(p.tensors, "w1"), _factor(p.tensors, "w2")
        return Seen(Kron(w1 * p.scale, w2.flatten(1)))
    if isinstance(algorithm, LoHa) and "t1" not in p.tensors:
        return Seen(_of_loha(p))
    if isinstance(algorithm, Sandwich) and algorithm.pieces_of(p) <= {"delta", "shift"}:
        return Seen(_flat(algorithm.delta(p, site.shape) * p.scale))
    if weight is None:
        return Seen(None, "of the turn or the factors alone; the change needs the base")
    return Seen(_flat(algorithm.weight_deviation(p, wide(weight))))


def _flat(change: Tensor) -> Dense:
    return Dense(change.flatten(1) if change.dim() > 1 else change[:, None])


def _smaller(up: Tensor, down: Tensor) -> Change:
    """Of two factors whichever form takes less."""
    out, rank = up.shape
    return UpDown(up, down) if rank < min(out, down.shape[1]) else Dense(up @ down)


def _of_low_rank(algorithm: LowRank, p: Params) -> Seen:
    t = p.tensors
    if "q" in t and "base_q" not in t:
        up = t["p"].flatten(1) * t["lambda"].reshape(1, -1) * p.scale
        return Seen(_smaller(up, t["q"].flatten(1)), "with what it started from, which needs the base")
    up, down = algorithm.factors(p)
    return Seen(_smaller(up, down.flatten(1)))


def _of_glora(p: Params, weight: Tensor | None) -> Seen:
    t = {name: tensor.flatten(1) for name, tensor in p.tensors.items()}
    if weight is None:
        return Seen(_smaller(t["b1"] * p.scale, t["b2"]), "of the part beside the weight; the other needs the base")
    if weight.dim() > 2:
        return Seen(_flat(GLoRA().weight_deviation(p, wide(weight))))
    up = torch.cat([wide(weight) @ t["a1"], t["b1"]], 1) * p.scale
    return Seen(_smaller(up, torch.cat([t["a2"], t["b2"]])))


def _of_loha(p: Params) -> Change:
    t = p.tensors
    (out, rank), n = t["w1_a"].shape, t["w1_b"].shape[1]
    if rank**2 * (out + n) < out * n and rank**2 < min(out, n):
        return UpDown(paired_rows(t["w1_a"], t["w2_a"] * p.scale), paired_columns(t["w1_b"], t["w2_b"]))
    return Dense((t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"]) * p.scale)


def _factor(t: Mapping[str, Tensor], name: str) -> Tensor:
    """One factor of a Kronecker product `[rows, columns, *k]`, where it may be a product itself."""
    if name in t:
        return t[name]
    one, two = t[f"{name}_a"], t[f"{name}_b"]
    return tucker(t["t2"], one.mT, two) if name == "w2" and "t2" in t else one @ two


@torch.no_grad()
def turn_size(record: Record) -> float:
    """|T(1) - 1| of a map of weights that does nothing but turn or multiply channels, for which no weight is needed."""
    algorithm, p, site = record.algorithm, record.params, record.site
    some = next(iter(p.tensors.values()))
    on_inputs = isinstance(algorithm, Sandwich) and "pre" in algorithm.pieces_of(p)
    size = site.shape[1] if on_inputs else site.shape[0]
    if "upper" in p.tensors:  # its own shape tells the length of the rows, which the site may not know
        blocks, half = p.tensors["upper"].shape
        size = blocks * round((1 + math.sqrt(1 + 8 * half)) / 2)
    total = 0.0
    for start in range(0, size, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, size), device=some.device)
        ones = wide(some.new_zeros((len(rows), size)))
        ones[torch.arange(len(rows), device=some.device), rows] = 1.0
        change = algorithm.weight_deviation(p, ones if on_inputs else ones.mT)
        total += float(accurate(change).square().sum())
    return math.sqrt(total)
