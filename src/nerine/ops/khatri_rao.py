"""A Hadamard product of two low-rank products is one low-rank product of rank r²:

(A₁·B₁) ∘ (A₂·B₂) = A·B,    A = rows of A₁ ⊗ rows of A₂  [out, r²],    B = columns of B₁ ⊗ columns of B₂  [r², in]
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["paired_columns", "paired_rows"]


def paired_rows(a1: Tensor, a2: Tensor) -> Tensor:
    """`[out, r²]` from two `[out, r]`."""
    return (a1[:, :, None] * a2[:, None, :]).flatten(1)


def paired_columns(b1: Tensor, b2: Tensor) -> Tensor:
    """`[r², n]` from two `[r, n]`."""
    return (b1[:, None] * b2[None]).flatten(0, 1)
