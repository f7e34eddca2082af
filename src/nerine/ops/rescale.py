"""A scale and an offset for each channel, with a backward that allocates one tensor of the output's size, not three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nerine.ops.kernel_choice import standing_in
from nerine.ops.precision import same_dtype, wide

__all__ = ["gain_of", "rescale", "stretch"]


def rescale(u: Tensor, gain: Tensor, offset: Tensor, channel: int) -> Tensor:
    """`u·gain + offset`; both `[channels]` in the format of `u`, along its dimension `channel` (negative)."""
    kernel = standing_in("rescale", u, gain, offset, channel)
    if kernel is not None:
        return kernel(u, gain, offset, channel)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch.addcmul(_over(offset, channel), u, _over(gain, channel))
    return _Rescale.apply(u, gain, offset, channel)  # type: ignore[no-any-return]


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """magnitude / norm, both `[n]`; one where the magnitude is zero."""
    return (magnitude / norm).masked_fill(magnitude == 0, 1.0)


def stretch(u: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, channel: int) -> Tensor:
    """`bias + gain·(u - bias)` with gain = `magnitude / norm` (`gain_of`), all but `u` `[channels]`.

    In half precision a gain near one is applied as what it adds, which would be lost in the gain itself.
    """
    kernel = standing_in("stretch", u, magnitude, norm, bias, channel)
    if kernel is not None:
        return kernel(u, magnitude, norm, bias, channel)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _stretched(u, gain_of(magnitude, norm), bias, channel)
    return _Stretch.apply(u, magnitude, norm, bias, channel)  # type: ignore[no-any-return]


def _stretched(u: Tensor, gain: Tensor, bias: Tensor | None, channel: int) -> Tensor:
    more = gain - 1
    factor = same_dtype(_over(more if u.dtype.itemsize < 4 else gain, channel), u)
    offset = None if bias is None else same_dtype(_over(bias * more, channel), u)
    if u.dtype.itemsize < 4:
        added = u * factor if offset is None else torch.addcmul(-offset, u, factor)
        return added.add_(u) if not torch.is_grad_enabled() else added + u
    return u * factor if offset is None else torch.addcmul(-offset, u, factor)


class _Stretch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, channel: int) -> Tensor:
        gain = gain_of(magnitude, norm)
        ctx.channel = channel
        u_kept = u if magnitude.requires_grad or norm.requires_grad else None
        ctx.save_for_backward(u_kept, magnitude, norm, gain, bias)
        return _stretched(u, gain, bias, channel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        u, magnitude, norm, gain, bias = ctx.saved_tensors
        need_u, need_magnitude, need_norm, need_bias, _ = ctx.needs_input_grad
        room: Tensor | None = None
        of_u = of_magnitude = of_norm = of_bias = None
        total = None if bias is None else _wide_per_channel(grad, ctx.channel)
        if need_magnitude or need_norm:
            room = grad * u
            share = _wide_per_channel(room, ctx.channel)
            share = (share if total is None else share.addcmul(total, wide(bias), value=-1)) / norm
            share.masked_fill_(magnitude == 0, 0.0)
            of_magnitude = same_dtype(share, magnitude) if need_magnitude else None
            of_norm = same_dtype((share * gain).neg_(), norm) if need_norm else None
        if need_u:
            over = same_dtype(_over(gain, ctx.channel), grad)
            of_u = grad * over if room is None or grad.dim() == 1 else torch.mul(grad, over, out=room)
        if need_bias and total is not None:
            of_bias = same_dtype((1 - gain) * total, bias)
        return of_u, of_magnitude, of_norm, of_bias, None


def _over(v: Tensor, channel: int) -> Tensor:
    return v.reshape(-1, *[1] * (-1 - channel))


def _per_channel(t: Tensor, channel: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over everything but the channels, in the format `dtype` if one is given and there is something to add up."""
    return t.sum([i for i in range(t.dim()) if i != channel % t.dim()], dtype=dtype) if t.dim() > 1 else t


def _wide_per_channel(t: Tensor, channel: int) -> Tensor:
    """The same in at least fp32: of many tokens, more than half precision could hold."""
    return wide(_per_channel(t, channel, torch.float32 if t.dtype.itemsize < 4 else None))


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
