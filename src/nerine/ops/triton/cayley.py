"""The Cayley transform of many small blocks at once: a program solves one block without leaving its registers.

The solution is a direct one in fp32: elimination with the largest pivot of each column, then substitution backwards.
Pivots would be at least 1 without a search, for the symmetric part of I - Q is I; but beside entries of 30 that costs
two of the seven digits. Rows stay where they are and remember when they were the pivot. torch's batched solver runs
several kernels and several passes over the blocks instead.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nerine.ops.triton.launch import check, jit, launching, padded, unsuited_tensors

__all__ = ["cayley", "unsuited"]

_MOST = 64  # channels in a block of which two copies fit into registers


@jit
def _solution(a: tl.tensor, b: tl.tensor, size: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """A⁻¹·B, both `[s, s]` in a larger square whose rest is zero in B and the unit matrix in A."""
    lane = tl.arange(0, SIZE)
    row, column = lane[:, None], lane[None, :]
    order = tl.zeros((SIZE,), tl.int32) + size  # at which step a row was the pivot; `size` while it was not
    for k in range(size):
        values = tl.sum(tl.where(column == k, a, 0.0), 1)
        free = order == size
        pivot = tl.argmax(tl.where(free, tl.abs(values), -1.0), 0)
        chosen = lane == pivot
        factor = values / tl.sum(tl.where(chosen, values, 0.0), 0)
        factor = tl.where(free & (lane != pivot), factor, 0.0)[:, None]
        a -= factor * tl.sum(tl.where(chosen[:, None], a, 0.0), 0)[None, :]
        b -= factor * tl.sum(tl.where(chosen[:, None], b, 0.0), 0)[None, :]
        order = tl.where(chosen, k, order)
    x = tl.zeros((SIZE, SIZE), tl.float32)
    for i in range(size):
        last = size - 1 - i
        column_last = tl.sum(tl.where(column == last, a, 0.0), 1)
        now = order == last
        solved = tl.sum(tl.where(now[:, None], b, 0.0), 0) / tl.sum(tl.where(now, column_last, 0.0), 0)
        x = tl.where(row == last, solved[None, :], x)
        b -= tl.where(order < last, column_last, 0.0)[:, None] * solved[None, :]
    return x


@jit
def _forward(q: tl.tensor, turn: tl.tensor, size: tl.tensor, SIZE: tl.constexpr) -> None:
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = (row < size) & (column < size)
    at = tl.cast(tl.program_id(0), tl.int64) * size * size + row * size + column
    block = tl.load(q + at, mask=inside, other=0.0)
    eye = tl.where(row == column, 1.0, 0.0)
    tl.store(turn + at, _solution(eye - block, 2 * block, size, SIZE), mask=inside)


@jit
def _backward(turn: tl.tensor, grad: tl.tensor, out: tl.tensor, size: tl.tensor, SIZE: tl.constexpr) -> None:
    """½·(I + R)ᵀ·G·(I + R)ᵀ from R - I, for (I - Q)⁻¹ = (I + R)/2."""
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = (row < size) & (column < size)
    block = tl.cast(tl.program_id(0), tl.int64) * size * size
    whole = tl.load(turn + block + column * size + row, mask=inside, other=0.0) + tl.where(row == column, 2.0, 0.0)
    right = tl.dot(tl.load(grad + block + row * size + column, mask=inside, other=0.0), whole, input_precision="ieee")
    tl.store(out + block + row * size + column, 0.5 * tl.dot(whole, right, input_precision="ieee"), mask=inside)


def _warps(size: int) -> int:
    """As many as keep a block in the registers."""
    return {16: 1, 32: 4}.get(padded(size), 16)


@torch.library.custom_op("nerine::cayley", mutates_args=(), schema="(Tensor q) -> Tensor")
def _cayley(q: Tensor) -> Tensor:
    turn = torch.empty_like(q)
    count, size, _ = q.shape
    if count:
        with launching(q):
            _forward[(count,)](q, turn, size, SIZE=padded(size), num_warps=_warps(size))
    return turn


@_cayley.register_fake
def _(q: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("nerine::cayley_grad", mutates_args=(), schema="(Tensor turn, Tensor grad) -> Tensor")
def _grad(turn: Tensor, grad: Tensor) -> Tensor:
    out = torch.empty_like(turn)
    count, size, _ = turn.shape
    if count:
        with launching(turn):
            _backward[(count,)](turn, grad.contiguous(), out, size, SIZE=padded(size), num_warps=_warps(size))
    return out


@_grad.register_fake
def _(turn: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(turn)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _pull(ctx: Any, grad: Tensor) -> Tensor:
    (turn,) = ctx.saved_tensors
    found: Tensor = _grad(turn, grad)
    return found


_cayley.register_autograd(_pull, setup_context=_keep)


def unsuited(q: Tensor) -> str:
    """Why the kernel cannot take these; empty if it can."""
    if q.dtype != torch.float32:
        return f"{q.dtype} is not float32"
    if q.dim() < 2 or q.shape[-1] != q.shape[-2] or not 0 < q.shape[-1] <= _MOST:
        return f"blocks {tuple(q.shape)}; they are square, of at most {_MOST} x {_MOST}"
    return unsuited_tensors(q)


def cayley(q: Tensor) -> Tensor:
    """R - I of skew-symmetric `q` `[..., s, s]`, s at most 64; R is orthogonal.

    Raises:
        OptionError: what `unsuited` says.
    """
    check("cayley", unsuited(q))
    turn: Tensor = _cayley(q.reshape(-1, *q.shape[-2:]).contiguous())
    return turn.reshape(q.shape)
