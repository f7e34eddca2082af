"""Blocks of channels times a small matrix each: one pass forward, and one backward for all three gradients.

In half precision the reference multiplies, puts the channels back in their order and adds the offset, each a pass of
its own; backward it reads the gradient three times. Here a tile is read, multiplied and written where it belongs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nerine.ops.precision import same_dtype
from nerine.ops.triton.launch import check, jit, launching, padded, parts, unsuited_tensors

__all__ = ["turn_channels", "unsuited"]

_MOST = 64  # channels in a block
_TOKENS = 32  # in a tile


@jit
def _forward(
    t: tl.tensor,
    matrices: tl.tensor,
    offset: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    n: tl.tensor,
    size: tl.tensor,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    OFFSET: tl.constexpr,
) -> None:
    block = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    at = tl.cast(token, tl.int64)[:, None] * n * size + block * size + column
    inside = (token < tokens)[:, None] & (column < size)
    x = tl.load(t + at, mask=inside, other=0.0)
    square = (row < size) & (column < size)
    m = tl.load(matrices + block * size * size + row * size + column, mask=square, other=0.0)
    out = tl.dot(x, m, input_precision="ieee")
    if OFFSET:
        out += tl.cast(tl.load(offset + block * size + column, mask=column < size, other=0.0), tl.float32)
    tl.store(y + at, out, mask=inside)


@jit
def _backward(
    t: tl.tensor,
    matrices: tl.tensor,
    grad: tl.tensor,
    grad_t: tl.tensor,
    grad_matrices: tl.tensor,
    grad_offset: tl.tensor,
    tokens: tl.tensor,
    n: tl.tensor,
    size: tl.tensor,
    each: tl.tensor,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    NEED_T: tl.constexpr,
) -> None:
    """Part `program_id(1)` of the tokens; the sums are `[parts, n, s, s]` and `[parts, n·s]`."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    square = (row < size) & (column < size)
    turned = tl.load(matrices + block * size * size + column * size + row, mask=square, other=0.0)
    of_matrix = tl.zeros((SIZE, SIZE), tl.float32)
    of_offset = tl.zeros((TOKENS, SIZE), tl.float32)
    for start in range(0, each, TOKENS):
        token = part * each + start + tl.arange(0, TOKENS)
        at = tl.cast(token, tl.int64)[:, None] * n * size + block * size + column
        inside = (token < tokens)[:, None] & (column < size)
        g = tl.load(grad + at, mask=inside, other=0.0)
        x = tl.load(t + at, mask=inside, other=0.0)
        if NEED_T:
            tl.store(grad_t + at, tl.dot(g, turned, input_precision="ieee"), mask=inside)
        of_matrix = tl.dot(tl.trans(x), g, acc=of_matrix, input_precision="ieee")
        of_offset += tl.cast(g, tl.float32)
    at = (part * n + block) * size
    tl.store(grad_matrices + at * size + row * size + column, of_matrix, mask=square)
    tl.store(grad_offset + at + tl.arange(0, SIZE), tl.sum(of_offset, 0), mask=tl.arange(0, SIZE) < size)


@torch.library.custom_op(
    "nerine::turn_channels", mutates_args=(), schema="(Tensor t, Tensor matrices, Tensor? offset) -> Tensor"
)
def _turn(t: Tensor, matrices: Tensor, offset: Tensor | None) -> Tensor:
    """Of contiguous `t` `[tokens, n·s]` and matrices."""
    y = torch.empty_like(t)
    n, size, _ = matrices.shape
    matrices = same_dtype(matrices, t)
    if len(t):
        grid = (-(-len(t) // _TOKENS), n)
        with launching(t):
            _forward[grid](
                t,
                matrices,
                t if offset is None else offset,
                y,
                len(t),
                n,
                size,
                TOKENS=_TOKENS,
                SIZE=padded(size),
                OFFSET=offset is not None,
                num_warps=8,  # with four, products in fp32 do not fit into the registers
                num_stages=1,
            )
    return y


@_turn.register_fake
def _(t: Tensor, matrices: Tensor, offset: Tensor | None) -> Tensor:
    return torch.empty_like(t)


@torch.library.custom_op(
    "nerine::turn_channels_grad",
    mutates_args=(),
    schema="(Tensor t, Tensor matrices, Tensor grad, bool need_t) -> (Tensor, Tensor, Tensor)",
)
def _grads(t: Tensor, matrices: Tensor, grad: Tensor, need_t: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Those of t, and in fp32 of the matrices and of the offset."""
    n, size, _ = matrices.shape
    count, each = parts(len(t), _TOKENS, n)
    grad, matrices = grad.contiguous(), same_dtype(matrices, t)
    of_t = torch.empty_like(t) if need_t else t.new_empty(0)
    of_matrices = t.new_empty((count, n, size, size), dtype=torch.float32)
    of_offset = t.new_empty((count, n * size), dtype=torch.float32)
    with launching(t):
        _backward[(n, count)](
            t,
            matrices,
            grad,
            of_t,
            of_matrices,
            of_offset,
            len(t),
            n,
            size,
            each,
            TOKENS=_TOKENS,
            SIZE=padded(size),
            NEED_T=need_t,
            num_warps=8,
            num_stages=1,
        )
    return of_t, of_matrices.sum(0), of_offset.sum(0)


@_grads.register_fake
def _(t: Tensor, matrices: Tensor, grad: Tensor, need_t: bool) -> tuple[Tensor, Tensor, Tensor]:
    of_t = torch.empty_like(t) if need_t else t.new_empty(0)
    of_matrices = torch.empty_like(matrices, dtype=torch.float32)
    return of_t, of_matrices, t.new_empty(t.shape[-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    t, matrices, offset = inputs
    ctx.save_for_backward(t, matrices)
    ctx.offset_dtype = None if offset is None else offset.dtype


def _pull(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t, matrices = ctx.saved_tensors
    need_t, need_matrices, need_offset = ctx.needs_input_grad
    of_t, of_matrices, of_offset = _grads(t, matrices, grad, need_t)
    return (
        of_t if need_t else None,
        same_dtype(of_matrices, matrices) if need_matrices else None,
        of_offset.type(ctx.offset_dtype) if need_offset else None,
    )


_turn.register_autograd(_pull, setup_context=_keep)


def unsuited(t: Tensor, matrices: Tensor, offset: Tensor | None = None) -> str:
    """Why the kernel cannot take these; empty if it can."""
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2] or not 0 < matrices.shape[1] <= _MOST:
        return f"matrices {tuple(matrices.shape)}; they are `[n, s, s]` with s of at most {_MOST}"
    if matrices.shape[0] * matrices.shape[1] != t.shape[-1] or (offset is not None and offset.numel() != t.shape[-1]):
        return f"{t.shape[-1]} channels for matrices {tuple(matrices.shape)} and the offset"
    return unsuited_tensors(t, matrices, offset)


def turn_channels(t: Tensor, matrices: Tensor, offset: Tensor | None = None) -> Tensor:
    """Each block of s channels of `t` `[..., n·s]` times its own of the `matrices` `[n, s, s]`, plus `offset`.

    Raises:
        OptionError: what `unsuited` says.
    """
    check("turn_channels", unsuited(t, matrices, offset))
    offset = None if offset is None else offset.reshape(-1).contiguous()
    turned: Tensor = _turn(t.reshape(-1, t.shape[-1]).contiguous(), matrices.contiguous(), offset)
    return turned.reshape(t.shape)
