"""Blocks of channels times a small matrix each, in one pass over the activation and without a copy of it.

y[..., n·s] = t[..., n·s] · diag(M₁, …, M_n) (+ offset)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nerine.ops.kernel_choice import standing_in
from nerine.ops.precision import full_precision, same_dtype

__all__ = ["turn_channels"]


def turn_channels(t: Tensor, matrices: Tensor, offset: Tensor | None = None) -> Tensor:
    """Each block of s channels of `t` `[..., n·s]` times its own of the `matrices` `[n, s, s]`, plus `offset`."""
    kernel = standing_in("turn_channels", t, matrices, offset)
    if kernel is not None:
        return kernel(t, matrices, offset)
    matrices = same_dtype(matrices, t)
    offset = None if offset is None else same_dtype(offset, t)
    with full_precision(t):
        if torch.compiler.is_compiling() or t.dtype.itemsize < 4:
            turned = torch.bmm(_blocks(t, matrices), matrices).transpose(0, 1).reshape(t.shape)
            return turned if offset is None else turned + offset
        if not torch.is_grad_enabled():
            return _turned(t, matrices, offset)
        return _Turn.apply(t, matrices, offset)  # type: ignore[no-any-return]


def _blocks(t: Tensor, matrices: Tensor) -> Tensor:
    """`t` as `[n, tokens, s]`, a view where it can be."""
    n, size, _ = matrices.shape
    return t.reshape(-1, n, size).transpose(0, 1)


def _turned(t: Tensor, matrices: Tensor, offset: Tensor | None) -> Tensor:
    blocks = _blocks(t, matrices)
    n, tokens, size = blocks.shape
    if offset is None:
        out = t.new_empty((tokens, n, size))
        torch.bmm(blocks, matrices, out=out.transpose(0, 1))  # written where it belongs, with gaps between the blocks
    else:
        out = offset.reshape(1, n, size).expand(tokens, -1, -1).contiguous()
        out.transpose(0, 1).baddbmm_(blocks, matrices)
    return out.reshape(t.shape)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, matrices: Tensor, offset: Tensor | None) -> Tensor:
        ctx.save_for_backward(t if matrices.requires_grad else None, matrices)
        return _turned(t, matrices, offset)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        t, matrices = ctx.saved_tensors
        need_t, need_matrices, need_offset = ctx.needs_input_grad
        grad_t = _turned(grad, matrices.mT, None) if need_t else None
        grad_matrices = torch.bmm(_blocks(t, matrices).mT, _blocks(grad, matrices)) if need_matrices else None
        grad_offset = grad.reshape(-1, grad.shape[-1]).sum(0) if need_offset else None
        return grad_t, grad_matrices, grad_offset
