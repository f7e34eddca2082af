"""A scale and an offset for each channel: one pass forward, and one backward that gives all three gradients.

Both may be in fp32 beside an activation in half precision: each output is computed in fp32 and rounded once, so that
a gain near one loses nothing, and no pass is needed that adds what the gain adds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nerine.ops.precision import same_dtype
from nerine.ops.rescale import gain_of
from nerine.ops.triton.launch import check, jit, launching, parts, unsuited_tensors

__all__ = ["rescale", "stretch", "unsuited", "unsuited_stretch"]


@jit
def _forward_last(
    u: tl.tensor,
    gain: tl.tensor,
    offset: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = channel < channels
    factor = tl.cast(tl.load(gain + channel, mask=inside, other=0.0), tl.float32)
    added = tl.cast(tl.load(offset + channel, mask=inside, other=0.0), tl.float32)
    here = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * channels + channel[None, :]
    x = tl.cast(tl.load(u + at, mask=here, other=0.0), tl.float32)
    tl.store(y + at, x * factor[None, :] + added[None, :], mask=here)


@jit
def _forward_apart(
    u: tl.tensor,
    gain: tl.tensor,
    offset: tl.tensor,
    y: tl.tensor,
    channels: tl.tensor,
    inner: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """`[outer, channels, inner]`, of which a program takes one channel of one sample."""
    first = tl.cast(tl.program_id(0), tl.int64) * inner
    channel = tl.program_id(0) % channels
    factor = tl.cast(tl.load(gain + channel), tl.float32)
    added = tl.cast(tl.load(offset + channel), tl.float32)
    for start in range(0, inner, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.cast(tl.load(u + first + place, mask=place < inner, other=0.0), tl.float32)
        tl.store(y + first + place, x * factor + added, mask=place < inner)


@jit
def _backward_last(
    u: tl.tensor,
    grad: tl.tensor,
    gain: tl.tensor,
    grad_u: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    each: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    NEED_U: tl.constexpr,
) -> None:
    """`[rows, channels]`; part `program_id(1)` of the rows; sums `[parts, 2, channels]`."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.program_id(1)
    inside = channel < channels
    factor = tl.cast(tl.load(gain + channel, mask=inside, other=0.0), tl.float32)
    of_gain = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_offset = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, each, ROWS):
        row = tl.cast(part * each + start + tl.arange(0, ROWS), tl.int64)
        here = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        g = tl.cast(tl.load(grad + at, mask=here, other=0.0), tl.float32)
        of_gain += g * tl.cast(tl.load(u + at, mask=here, other=0.0), tl.float32)
        of_offset += g
        if NEED_U:
            tl.store(grad_u + at, g * factor[None, :], mask=here)
    tl.store(sums + (2 * part) * channels + channel, tl.sum(of_gain, 0), mask=inside)
    tl.store(sums + (2 * part + 1) * channels + channel, tl.sum(of_offset, 0), mask=inside)


@jit
def _backward_apart(
    u: tl.tensor,
    grad: tl.tensor,
    gain: tl.tensor,
    grad_u: tl.tensor,
    sums: tl.tensor,
    outer: tl.tensor,
    channels: tl.tensor,
    inner: tl.tensor,
    each: tl.tensor,
    BLOCK: tl.constexpr,
    NEED_U: tl.constexpr,
) -> None:
    """`[outer, channels, inner]`: one channel, and part `program_id(1)` of the outer axis."""
    channel = tl.program_id(0)
    part = tl.program_id(1)
    factor = tl.cast(tl.load(gain + channel), tl.float32)
    of_gain = tl.zeros((BLOCK,), tl.float32)
    of_offset = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.minimum(each, outer - part * each)):
        sample = tl.cast(part * each + i, tl.int64)
        for start in range(0, inner, BLOCK):
            place = start + tl.arange(0, BLOCK)
            here = place < inner
            at = (sample * channels + channel) * inner + place
            g = tl.cast(tl.load(grad + at, mask=here, other=0.0), tl.float32)
            of_gain += g * tl.cast(tl.load(u + at, mask=here, other=0.0), tl.float32)
            of_offset += g
            if NEED_U:
                tl.store(grad_u + at, g * factor, mask=here)
    tl.store(sums + (2 * part) * channels + channel, tl.sum(of_gain, 0))
    tl.store(sums + (2 * part + 1) * channels + channel, tl.sum(of_offset, 0))


def _is_apart(u: Tensor, channel: int) -> bool:
    """Whether the channels are taken from where they stand; else they are last in memory, or brought there."""
    return channel < -1 and not u.movedim(channel, -1).is_contiguous()


def _sizes(u: Tensor, channel: int) -> tuple[int, int, int]:
    """What lies before the channels, they themselves, and what lies behind."""
    return u.shape[:channel].numel(), u.shape[channel], u.shape[channel:].numel() // u.shape[channel]


@torch.library.custom_op(
    "nerine::rescale", mutates_args=(), schema="(Tensor u, Tensor gain, Tensor offset, int channel) -> Tensor"
)
def _rescale(u: Tensor, gain: Tensor, offset: Tensor, channel: int) -> Tensor:
    gain, offset = gain.contiguous(), offset.contiguous()
    if _is_apart(u, channel):
        u = u.contiguous()
        y = torch.empty_like(u)
        outer, channels, inner = _sizes(u, channel)
        if u.numel():
            with launching(u):
                _forward_apart[(outer * channels,)](u, gain, offset, y, channels, inner, BLOCK=1024)
        return y
    last = u.movedim(channel, -1).contiguous()
    y = torch.empty_like(last)
    outer, channels, _ = _sizes(last, -1)
    if u.numel():
        with launching(u):
            grid = (-(-outer // 16), -(-channels // 128))
            _forward_last[grid](last, gain, offset, y, outer, channels, ROWS=16, CHANNELS=128)
    return y.movedim(-1, channel)


def _shaped_like(u: Tensor, channel: int) -> Tensor:
    """A fresh tensor with the shape of `u` and its order in memory."""
    if _is_apart(u, channel):
        return torch.empty_like(u, memory_format=torch.contiguous_format)
    last = torch.empty_like(u.movedim(channel, -1), memory_format=torch.contiguous_format)
    return last.movedim(-1, channel)


@_rescale.register_fake
def _(u: Tensor, gain: Tensor, offset: Tensor, channel: int) -> Tensor:
    return _shaped_like(u, channel)


@torch.library.custom_op(
    "nerine::rescale_grad",
    mutates_args=(),
    schema="(Tensor u, Tensor grad, Tensor gain, int channel, bool need_u) -> (Tensor, Tensor)",
)
def _grads(u: Tensor, grad: Tensor, gain: Tensor, channel: int, need_u: bool) -> tuple[Tensor, Tensor]:
    """The gradient of u, and those of gain and offset `[2, channels]` in fp32."""
    if _is_apart(u, channel):
        u, grad = u.contiguous(), grad.contiguous()
        of_u, sums = _apart(u, grad, gain.contiguous(), channel, need_u)
        return of_u, sums.sum(0)
    of_u, sums = _last(
        u.movedim(channel, -1).contiguous(), grad.movedim(channel, -1).contiguous(), gain.contiguous(), need_u
    )
    return of_u.movedim(-1, channel) if need_u else of_u, sums.sum(0)


def _last(u: Tensor, grad: Tensor, gain: Tensor, need_u: bool) -> tuple[Tensor, Tensor]:
    rows, channels, _ = _sizes(u, -1)
    across = -(-channels // 128)
    count, each = parts(rows, 16, across)
    of_u = torch.empty_like(u) if need_u else u.new_empty(0)
    sums = gain.new_empty((count, 2, channels), dtype=torch.float32)
    with launching(u):
        _backward_last[(across, count)](
            u, grad, gain, of_u, sums, rows, channels, each, ROWS=16, CHANNELS=128, NEED_U=need_u
        )
    return of_u, sums


def _apart(u: Tensor, grad: Tensor, gain: Tensor, channel: int, need_u: bool) -> tuple[Tensor, Tensor]:
    outer, channels, inner = _sizes(u, channel)
    count, each = parts(outer, 1, channels)
    of_u = torch.empty_like(u) if need_u else u.new_empty(0)
    sums = gain.new_empty((count, 2, channels), dtype=torch.float32)
    with launching(u):
        _backward_apart[(channels, count)](
            u, grad, gain, of_u, sums, outer, channels, inner, each, BLOCK=1024, NEED_U=need_u
        )
    return of_u, sums


@_grads.register_fake
def _(u: Tensor, grad: Tensor, gain: Tensor, channel: int, need_u: bool) -> tuple[Tensor, Tensor]:
    of_u = _shaped_like(u, channel)
    return of_u if need_u else u.new_empty(0), gain.new_empty((2, *gain.shape), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, gain, offset, ctx.channel = inputs
    ctx.save_for_backward(u, gain, offset)


def _pull(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, gain, offset = ctx.saved_tensors
    need_u, need_gain, need_offset, _ = ctx.needs_input_grad
    of_u, sums = _grads(u, grad, gain, ctx.channel, need_u)
    of_gain = same_dtype(sums[0], gain) if need_gain else None
    return of_u if need_u else None, of_gain, same_dtype(sums[1], offset) if need_offset else None, None


_rescale.register_autograd(_pull, setup_context=_keep)


def unsuited(u: Tensor, gain: Tensor, offset: Tensor, channel: int) -> str:
    """Why the kernel cannot take these; empty if it can."""
    if not -u.dim() <= channel < 0:
        return f"channel {channel} is no dimension, counted from the end, of {tuple(u.shape)}"
    if not gain.shape == offset.shape == u.shape[channel : channel + 1 or None] or not gain.numel():
        return f"gain {tuple(gain.shape)} and offset {tuple(offset.shape)} for {u.shape[channel]} channels"
    return unsuited_tensors(u, gain, offset)


def rescale(u: Tensor, gain: Tensor, offset: Tensor, channel: int) -> Tensor:
    """`u·gain + offset`; both `[channels]`, in fp32 or in the format of `u`, along its dimension `channel` (negative).

    Raises:
        OptionError: what `unsuited` says.
    """
    check("rescale", unsuited(u, gain, offset, channel))
    scaled: Tensor = _rescale(u, gain, offset, channel)
    return scaled


def unsuited_stretch(u: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, channel: int) -> str:
    """Likewise, for `stretch`."""
    return unsuited(u, magnitude, norm, channel) or unsuited(u, magnitude, norm if bias is None else bias, channel)


def stretch(u: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, channel: int) -> Tensor:
    """`bias + gain·(u - bias)` with gain = `magnitude / norm`, one where that is zero; all but `u` `[channels]`.

    Raises:
        OptionError: what `unsuited_stretch` says.
    """
    check("stretch", unsuited_stretch(u, magnitude, norm, bias, channel))
    gain = gain_of(magnitude, norm)
    return rescale(u, gain, torch.zeros_like(gain) if bias is None else bias * (1 - gain), channel)
