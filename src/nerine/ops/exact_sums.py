"""Sums of squares in fp64 of matrices in fp32, some rows at a time: norms, and what a low-rank product leaves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["double", "has_gram", "norm_of", "rest_of", "square_of"]

CHUNK = 1 << 18  # entries that are widened to fp64 at a time: they stay in the cache


def has_gram(matrix: Tensor) -> bool:
    """Whether the squares of a matrix in fp64 are precise enough, and the matrix large enough for them to be faster."""
    return matrix.dtype == torch.float32 and matrix.device.type != "mps" and min(matrix.shape) > 128


def rest_of(matrix: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> float:
    """|M - u·s·vh|, computed entry by entry, some rows at a time."""
    rows = max(1, CHUNK // matrix.shape[1])
    us, vh = double(u) * s, double(vh)
    parts = zip(matrix.split(rows), us.split(rows), strict=True)
    return math.sqrt(sum(square_of(double(part) - up @ vh) for part, up in parts))


def norm_of(matrix: Tensor) -> float:
    """|M|."""
    matrix = matrix if matrix.is_contiguous() else matrix.mT
    return math.sqrt(sum(square_of(part) for part in matrix.split(max(1, CHUNK // matrix.shape[1]))))


def square_of(t: Tensor) -> float:
    """The sum of the squares, in fp64."""
    flat = double(t).flatten()
    return float(flat.dot(flat))


def double(t: Tensor) -> Tensor:
    """In fp64, where the device has it."""
    return t if t.device.type == "mps" else t.double()
