"""The entrywise product of two low-rank products, made tile by tile, and the gradients of its four factors from that of
the product, which is read once. Neither of the two products ever lies in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nerine.ops.triton.launch import check, jit, launching, padded, unsuited_tensors

__all__ = ["hadamard", "unsuited"]

_MOST = 32  # ranks that fit into registers beside a tile
_ROWS, _COLUMNS, _REACH = 64, 64, 4  # a tile, and how many of them, side by side, a program of the backward pass takes


@jit
def _factor(pointer: tl.tensor, row: tl.tensor, rows: tl.tensor, column: tl.tensor, columns: tl.tensor) -> tl.tensor:
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + tl.cast(row, tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)


@jit
def _forward(
    a1: tl.tensor,
    b1: tl.tensor,
    a2: tl.tensor,
    b2: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank1: tl.tensor,
    rank2: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    left1, right1 = _factor(a1, row, rows, r, rank1), _factor(b1, r, rank1, column, columns)
    left2, right2 = _factor(a2, row, rows, r, rank2), _factor(b2, r, rank2, column, columns)
    product = tl.dot(left1, right1, input_precision="ieee") * tl.dot(left2, right2, input_precision="ieee")
    at = tl.cast(row, tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + at, scale * product, mask=(row < rows)[:, None] & (column < columns)[None, :])


@jit
def _backward(
    a1: tl.tensor,
    b1: tl.tensor,
    a2: tl.tensor,
    b2: tl.tensor,
    grad: tl.tensor,
    grad_a1: tl.tensor,
    grad_b1: tl.tensor,
    grad_a2: tl.tensor,
    grad_b2: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank1: tl.tensor,
    rank2: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    REACH: tl.constexpr,
) -> None:
    """Some rows, and REACH tiles of columns. Parts: grad_a `[tiles of columns / REACH, rows, rank]`, grad_b `[tiles of
    rows, rank, columns]`."""
    down, across = tl.program_id(0), tl.program_id(1)
    row = down * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, RANK)
    left1, left2 = _factor(a1, row, rows, r, rank1), _factor(a2, row, rows, r, rank2)
    total1 = tl.zeros((ROWS, RANK), tl.float32)
    total2 = tl.zeros((ROWS, RANK), tl.float32)
    for i in range(REACH):
        column = (across * REACH + i) * COLUMNS + tl.arange(0, COLUMNS)
        right1, right2 = _factor(b1, r, rank1, column, columns), _factor(b2, r, rank2, column, columns)
        g = scale * tl.cast(_factor(grad, row, rows, column, columns), tl.float32)
        one = g * tl.dot(left2, right2, input_precision="ieee")  # the gradient of a₁·b₁
        two = g * tl.dot(left1, right1, input_precision="ieee")
        total1 = tl.dot(one, tl.trans(right1), acc=total1, input_precision="ieee")
        total2 = tl.dot(two, tl.trans(right2), acc=total2, input_precision="ieee")
        here = (column < columns)[None, :]
        at1 = (down * rank1 + r)[:, None] * columns + column[None, :]
        at2 = (down * rank2 + r)[:, None] * columns + column[None, :]
        of_b1 = tl.dot(tl.trans(left1), one, input_precision="ieee")
        of_b2 = tl.dot(tl.trans(left2), two, input_precision="ieee")
        tl.store(grad_b1 + at1, of_b1, mask=(r < rank1)[:, None] & here)
        tl.store(grad_b2 + at2, of_b2, mask=(r < rank2)[:, None] & here)
    at = tl.cast(across, tl.int64) * rows + row
    inside = (row < rows)[:, None]
    tl.store(grad_a1 + at[:, None] * rank1 + r[None, :], total1, mask=inside & (r < rank1)[None, :])
    tl.store(grad_a2 + at[:, None] * rank2 + r[None, :], total2, mask=inside & (r < rank2)[None, :])


@torch.library.custom_op(
    "nerine::hadamard",
    mutates_args=(),
    schema="(Tensor a1, Tensor b1, Tensor a2, Tensor b2, float scale) -> Tensor",
)
def _hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Tensor:
    rows, columns = a1.shape[0], b1.shape[1]
    out = a1.new_empty((rows, columns))
    ranks = a1.shape[1], a2.shape[1]
    grid = (-(-rows // _ROWS), -(-columns // _COLUMNS))
    with launching(a1):
        _forward[grid](
            a1, b1, a2, b2, out, rows, columns, *ranks, scale, ROWS=_ROWS, COLUMNS=_COLUMNS, RANK=padded(max(ranks))
        )
    return out


@_hadamard.register_fake
def _(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Tensor:
    return a1.new_empty((a1.shape[0], b1.shape[1]))


@torch.library.custom_op(
    "nerine::hadamard_grad",
    mutates_args=(),
    schema="(Tensor a1, Tensor b1, Tensor a2, Tensor b2, Tensor grad, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _grads(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = grad.shape
    ranks = a1.shape[1], a2.shape[1]
    grid = (-(-rows // _ROWS), -(-columns // (_COLUMNS * _REACH)))
    of_a1, of_a2 = (a1.new_empty((grid[1], rows, rank)) for rank in ranks)
    of_b1, of_b2 = (a1.new_empty((grid[0], rank, columns)) for rank in ranks)
    with launching(a1):
        _backward[grid](
            a1,
            b1,
            a2,
            b2,
            grad.contiguous(),
            of_a1,
            of_b1,
            of_a2,
            of_b2,
            rows,
            columns,
            *ranks,
            scale,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            RANK=padded(max(ranks)),
            num_warps=8,
            num_stages=1,
            REACH=_REACH,
        )
    return of_a1.sum(0), of_b1.sum(0), of_a2.sum(0), of_b2.sum(0)


@_grads.register_fake
def _(
    a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(a1), torch.empty_like(b1), torch.empty_like(a2), torch.empty_like(b2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *factors, ctx.scale = inputs
    ctx.save_for_backward(*factors)


def _pull(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = _grads(*ctx.saved_tensors, grad, ctx.scale)
    return *(g if need else None for g, need in zip(found, ctx.needs_input_grad[:4], strict=True)), None


_hadamard.register_autograd(_pull, setup_context=_keep)


def unsuited(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0) -> str:
    """Why the kernel cannot take these; empty if it can."""
    shapes = [tuple(t.shape) for t in (a1, b1, a2, b2)]
    fits = all(len(shape) == 2 for shape in shapes) and a1.shape[1] == b1.shape[0] and a2.shape[1] == b2.shape[0]
    if not fits or a1.shape[0] != a2.shape[0] or b1.shape[1] != b2.shape[1] or not a1.numel() * b1.numel():
        return f"factors {shapes} make no two products of one shape"
    if not 0 < min(a1.shape[1], a2.shape[1]) <= max(a1.shape[1], a2.shape[1]) <= _MOST:
        return f"ranks {a1.shape[1]} and {a2.shape[1]}; at most {_MOST}"
    if any(t.dtype != torch.float32 for t in (a1, b1, a2, b2)):
        return "the factors are not all in float32"
    return unsuited_tensors(a1, b1, a2, b2)


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float = 1.0) -> Tensor:
    """`scale`·(a₁·b₁) ∘ (a₂·b₂) `[out, n]`; a `[out, rank]` and b `[rank, n]`, ranks at most 32.

    Raises:
        OptionError: what `unsuited` says.
    """
    check("hadamard", unsuited(a1, b1, a2, b2, scale))
    product: Tensor = _hadamard(a1.contiguous(), b1.contiguous(), a2.contiguous(), b2.contiguous(), scale)
    return product
