"""Row norms of a weight plus a low-rank product: V = W + B·A is made tile by tile and its squares are summed at once.

The reference adds up |W|², a cross term and a small own term; here each tile of V is in registers anyway, so its
entries are squared as they are, and the sum loses nothing to cancellation. The forward pass also keeps V·Aᵀ
`[out, rank]`, with which the gradient of B needs no further pass over the weight; that of A takes one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nerine.ops.precision import same_dtype, wide
from nerine.ops.row_norm import norm_from_square
from nerine.ops.triton.launch import check, jit, launching, padded, parts, unsuited_tensors

__all__ = ["low_rank_row_norm", "low_rank_row_square", "unsuited"]

_MOST = 128  # ranks that fit into registers beside a tile of the weight


@jit
def _forward(
    weight: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    square: tl.tensor,
    along: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    row_step: tl.tensor,
    column_step: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    KEEP: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    far = tl.cast(row, tl.int64)
    r = tl.arange(0, RANK)
    inside = row < rows
    factor = inside[:, None] & (r < rank)[None, :]
    u = tl.load(up + far[:, None] * rank + r[None, :], mask=factor, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    kept = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        here = column < columns
        d = tl.load(down + r[:, None] * columns + column[None, :], mask=(r < rank)[:, None] & here[None, :], other=0.0)
        at = far[:, None] * row_step + tl.cast(column, tl.int64)[None, :] * column_step
        w = tl.cast(tl.load(weight + at, mask=inside[:, None] & here[None, :], other=0.0), tl.float32)
        v = w + tl.dot(u, d, input_precision="ieee")
        total += v * v
        if KEEP:
            kept = tl.dot(v, tl.trans(d), acc=kept, input_precision="ieee")
    tl.store(square + row, tl.sum(total, 1), mask=inside)
    if KEEP:
        tl.store(along + far[:, None] * rank + r[None, :], kept, mask=factor)


@jit
def _backward(
    weight: tl.tensor,
    up: tl.tensor,
    down: tl.tensor,
    grad: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    rank: tl.tensor,
    row_step: tl.tensor,
    column_step: tl.tensor,
    each: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
) -> None:
    """A part, over `each` rows, of (2·g ∘ B)ᵀ·V."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    here = column < columns
    factor = (r < rank)[:, None] & here[None, :]
    d = tl.load(down + r[:, None] * columns + column[None, :], mask=factor, other=0.0)
    total = tl.zeros((RANK, COLUMNS), tl.float32)
    for start in range(0, each, ROWS):
        row = part * each + start + tl.arange(0, ROWS)
        far = tl.cast(row, tl.int64)
        inside = row < rows
        u = tl.load(up + far[:, None] * rank + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0.0)
        at = far[:, None] * row_step + tl.cast(column, tl.int64)[None, :] * column_step
        w = tl.cast(tl.load(weight + at, mask=inside[:, None] & here[None, :], other=0.0), tl.float32)
        v = w + tl.dot(u, d, input_precision="ieee")
        g = 2 * tl.load(grad + row, mask=inside, other=0.0)
        total = tl.dot(tl.trans(u * g[:, None]), v, acc=total, input_precision="ieee")
    tl.store(out + (part * rank + r)[:, None] * columns + column[None, :], total, mask=factor)


@torch.library.custom_op(
    "nerine::low_rank_row_square",
    mutates_args=(),
    schema="(Tensor weight, Tensor up, Tensor down, bool keep) -> (Tensor, Tensor)",
)
def _square(weight: Tensor, up: Tensor, down: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The squares, and V·Aᵀ where it is kept."""
    rows, columns = weight.shape
    rank = up.shape[1]
    square = up.new_empty(rows)
    along = up.new_empty((rows, rank) if keep else (0, rank))
    block = 16
    with launching(weight):
        _forward[(-(-rows // block),)](
            weight,
            up,
            down,
            square,
            along,
            rows,
            columns,
            rank,
            *weight.stride(),
            ROWS=block,
            COLUMNS=64,
            RANK=padded(rank),
            KEEP=keep,
        )
    return square, along


@_square.register_fake
def _(weight: Tensor, up: Tensor, down: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    rows, rank = weight.shape[0], up.shape[1]
    return up.new_empty(rows), up.new_empty((rows, rank) if keep else (0, rank))


@torch.library.custom_op(
    "nerine::low_rank_row_square_grad",
    mutates_args=(),
    schema="(Tensor weight, Tensor up, Tensor down, Tensor grad) -> Tensor",
)
def _down_grad(weight: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> Tensor:
    rows, columns = weight.shape
    rank, block = up.shape[1], 32
    across = -(-columns // block)
    count, each = parts(rows, 16, across)
    out = up.new_empty((count, rank, columns))
    with launching(weight):
        _backward[(across, count)](
            weight,
            up,
            down,
            grad.contiguous(),
            out,
            rows,
            columns,
            rank,
            *weight.stride(),
            each,
            ROWS=16,
            COLUMNS=block,
            RANK=padded(rank),
        )
    return out.sum(0)


@_down_grad.register_fake
def _(weight: Tensor, up: Tensor, down: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(down)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weight, up, down, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, up, down, output[1])


def _pull(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    weight, up, down, along = ctx.saved_tensors
    need_weight, need_up, need_down, _ = ctx.needs_input_grad
    twice = 2 * grad[:, None]
    of_weight = same_dtype(twice * torch.addmm(wide(weight), up, down), weight) if need_weight else None
    of_up = twice * along if need_up else None
    return of_weight, of_up, _down_grad(weight, up, down, grad) if need_down else None, None


_square.register_autograd(_pull, setup_context=_keep)


def unsuited(weight: Tensor, up: Tensor, down: Tensor, scale: float = 1.0, floor: float = 0.0) -> str:
    """Why the kernel cannot take these; empty if it can."""
    if up.dtype != torch.float32 or down.dtype != torch.float32:
        return f"factors are {up.dtype} and {down.dtype}, not float32"
    if not 0 < up.shape[1] <= _MOST or not weight.numel():
        return (
            f"rank {up.shape[1]} of a weight {tuple(weight.shape)}; the rank is at most {_MOST}, and nothing is empty"
        )
    return unsuited_tensors(weight, up, down)


def low_rank_row_square(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Squared norms `[out]` of the rows of `weight + up·down`; up `[out, rank]`, down `[rank, in·Πk]`, both in fp32.

    Raises:
        OptionError: what `unsuited` says.
    """
    check("low_rank_row_square", unsuited(weight, up, down))
    keep = torch.is_grad_enabled() and up.requires_grad
    square: Tensor = _square(weight.flatten(1), up.contiguous(), down.contiguous(), keep)[0]
    return square


def low_rank_row_norm(weight: Tensor, up: Tensor, down: Tensor, scale: float, floor: float) -> Tensor:
    """Norms `[out]`, at least `floor`, of the rows of `weight + scale·up·down`, likewise."""
    return norm_from_square(low_rank_row_square(weight, up * scale, down), floor)
