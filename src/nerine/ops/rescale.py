"""A scale and an offset for each channel, with a backward that allocates one tensor of the output's size, not three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["rescale"]


def rescale(u: Tensor, gain: Tensor, offset: Tensor, channel: int) -> Tensor:
    """`u·gain + offset`; both `[channels]` in the format of `u`, along its dimension `channel` (negative)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch.addcmul(_over(offset, channel), u, _over(gain, channel))
    return _Rescale.apply(u, gain, offset, channel)  # type: ignore[no-any-return]


def _over(v: Tensor, channel: int) -> Tensor:
    return v.reshape(-1, *[1] * (-1 - channel))


def _per_channel(t: Tensor, channel: int) -> Tensor:
    """Sum over everything but the channels."""
    return t.sum([i for i in range(t.dim()) if i != channel % t.dim()]) if t.dim() > 1 else t


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, gain: Tensor, offset: Tensor, channel: int) -> Tensor:
        ctx.channel = channel
        ctx.save_for_backward(u if gain.requires_grad else None, gain)
        return torch.addcmul(_over(offset, channel), u, _over(gain, channel))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        u, gain = ctx.saved_tensors
        need_u, need_gain, need_offset, _ = ctx.needs_input_grad
        room: Tensor | None = None
        grad_u = grad_gain = grad_offset = None
        if need_gain:
            room = grad * u
            grad_gain = _per_channel(room, ctx.channel)
        if need_u:
            over = _over(gain, ctx.channel)
            grad_u = grad * over if room is None or room is grad_gain else torch.mul(grad, over, out=room)
        if need_offset:
            grad_offset = _per_channel(grad, ctx.channel)
        return grad_u, grad_gain, grad_offset, None
