"""All stages of a butterfly in one kernel: a program takes some tokens through every stage before it takes the next.

What a stage leaves lies in a scratch buffer of which a program uses the part of its own tokens: small enough for the
cache, whereas the reference carries the whole activation to memory and back at every run of stages, and once more to
put the channels in order. Between stages the program waits for its own writes. The buffer holds the *deviation* d of
the tokens so far, in fp32: x = t + d, so that a small turn is never rounded off the side of a large activation.

Backward the same buffer keeps every stage (recomputed), and a kernel for each stage makes the two gradients at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nerine.ops.precision import same_dtype
from nerine.ops.triton.launch import check, jit, launching, padded, parts, unsuited_tensors

__all__ = ["butterfly", "butterfly_deviation", "unsuited"]

_MOST = 64  # channels in a block
_TOKENS = 32  # in a tile


@jit
def _channels(
    block: tl.tensor, entry: tl.tensor, step: tl.tensor, HALF: tl.constexpr, HALVES: tl.constexpr
) -> tl.tensor:
    """Which channels a block takes at the stage of 2ⁱ = `step`: all of one half of its group, then the other's."""
    side, place = entry // HALF, entry % HALF
    return ((block // step * HALVES + side) * step + block % step) * HALF + place


@jit
def _forward(
    t: tl.tensor,
    turns: tl.tensor,
    held: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    stages: tl.tensor,
    n: tl.tensor,
    slots: tl.tensor,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    DEVIATION: tl.constexpr,
) -> None:
    """`held` `[slots, tokens, n·s]` gets d after stage i in slot i mod slots; what the last stage leaves is `out`."""
    size: tl.constexpr = HALF * HALVES
    token = tl.cast(tl.program_id(0), tl.int64) * TOKENS + tl.arange(0, TOKENS)
    entry = tl.arange(0, SIZE)
    order = entry % HALF * HALVES + entry // HALF  # within a block the two halves are interleaved
    square = (entry < size)[:, None] & (entry < size)[None, :]
    inside = (token < tokens)[:, None] & (entry < size)[None, :]
    slot = tl.cast(tokens, tl.int64) * n * size
    step = 1
    for stage in range(stages):
        now = tl.zeros((TOKENS, 1), tl.int32) + stage  # as a block, which masks can be combined with
        before = held + ((stage + slots - 1) % slots) * slot
        after = held + (stage % slots) * slot
        for block in range(n):
            at = token[:, None] * (n * size) + _channels(block, entry, step, HALF, HALVES)[None, :]
            x = tl.cast(tl.load(t + at, mask=inside, other=0.0), tl.float32)
            d = tl.load(before + at, mask=inside & (now > 0), other=0.0)
            turn = turns + (stage * n + block) * size * size + order[None, :] * size + order[:, None]
            r = tl.load(turn, mask=square, other=0.0)  # transposed
            d += tl.dot(tl.cast(x + d, t.dtype.element_ty), r, input_precision="ieee")
            tl.store(after + at, d, mask=inside & (now < stages - 1))
            tl.store(out + at, d if DEVIATION else x + d, mask=inside & (now == stages - 1))
        tl.debug_barrier()
        step = step * 2


@jit
def _backward(
    t: tl.tensor,
    turn: tl.tensor,
    d: tl.tensor,
    grad: tl.tensor,
    e: tl.tensor,
    next_e: tl.tensor,
    grad_t: tl.tensor,
    grad_turn: tl.tensor,
    tokens: tl.tensor,
    n: tl.tensor,
    step: tl.tensor,
    each: tl.tensor,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DEVIATION: tl.constexpr,
) -> None:
    """One stage, of input t + d and gradient grad + e, for a block and a part of the tokens; `next_e` is that of its
    input. LAST and FIRST say where in the forward order it stands: after the last e is zero, before the first d is."""
    size: tl.constexpr = HALF * HALVES
    block, part = tl.program_id(0), tl.program_id(1)
    entry = tl.arange(0, SIZE)
    order = entry % HALF * HALVES + entry // HALF
    square = (entry < size)[:, None] & (entry < size)[None, :]
    place = block * size * size + order[:, None] * size + order[None, :]
    r = tl.load(turn + place, mask=square, other=0.0)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    channels = _channels(block, entry, step, HALF, HALVES)[None, :]
    for start in range(0, each, TOKENS):
        token = tl.cast(part * each + start + tl.arange(0, TOKENS), tl.int64)
        at = token[:, None] * (n * size) + channels
        inside = (token < tokens)[:, None] & (entry < size)[None, :]
        x = tl.cast(tl.load(t + at, mask=inside, other=0.0), tl.float32)
        if not FIRST:
            x += tl.load(d + at, mask=inside, other=0.0)
        g = tl.cast(tl.load(grad + at, mask=inside, other=0.0), tl.float32)
        own = tl.zeros((TOKENS, SIZE), tl.float32)
        if not LAST:
            own = tl.load(e + at, mask=inside, other=0.0)
        whole = tl.cast(g + own, t.dtype.element_ty)
        total = tl.dot(tl.trans(whole), tl.cast(x, t.dtype.element_ty), acc=total, input_precision="ieee")
        own += tl.dot(whole, r, input_precision="ieee")
        if FIRST:
            tl.store(grad_t + at, own if DEVIATION else g + own, mask=inside)
        else:
            tl.store(next_e + at, own, mask=inside)
    tl.store(grad_turn + part * n * size * size + place, total, mask=square)


def _halves(turns: Tensor) -> dict[str, int]:
    """A single block of odd size has no halves."""
    size = turns.shape[-1]
    halves = 1 if size % 2 else 2
    return {"HALF": size // halves, "HALVES": halves, "TOKENS": _TOKENS, "SIZE": padded(size)}


def _run(t: Tensor, turns: Tensor, held: Tensor, out: Tensor, deviation: bool) -> None:
    grid = (-(-len(t) // _TOKENS),)
    with launching(t):
        _forward[grid](
            t,
            same_dtype(turns, t),
            held,
            out,
            len(t),
            *turns.shape[:2],
            len(held),
            **_halves(turns),
            DEVIATION=deviation,
            num_warps=8,  # with four, products in fp32 do not fit into the registers
            num_stages=1,  # nothing may be read ahead: a stage reads what the one before it wrote
        )


@torch.library.custom_op(
    "nerine::butterfly", mutates_args=(), schema="(Tensor t, Tensor turns, bool deviation) -> Tensor"
)
def _butterfly(t: Tensor, turns: Tensor, deviation: bool) -> Tensor:
    """Of contiguous `t` `[tokens, n·s]` and turns."""
    out = torch.empty_like(t)
    if len(t):
        held = t.new_empty((min(2, max(1, len(turns) - 1)), *t.shape), dtype=torch.float32)
        _run(t, turns, held, out, deviation)
    return out


@_butterfly.register_fake
def _(t: Tensor, turns: Tensor, deviation: bool) -> Tensor:
    return torch.empty_like(t)


@torch.library.custom_op(
    "nerine::butterfly_grad",
    mutates_args=(),
    schema="(Tensor t, Tensor turns, Tensor grad, bool deviation) -> (Tensor, Tensor)",
)
def _grads(t: Tensor, turns: Tensor, grad: Tensor, deviation: bool) -> tuple[Tensor, Tensor]:
    stages, n, size, _ = turns.shape
    of_t, of_turns = torch.empty_like(t), torch.zeros_like(turns)
    if not len(t):
        return of_t, of_turns
    held = t.new_empty((max(1, stages - 1), *t.shape), dtype=torch.float32)
    if stages > 1:
        _run(t, turns, held, torch.empty_like(t), deviation)
    grad = grad.contiguous()
    count, each = parts(len(t), _TOKENS, n)
    sums = t.new_empty((stages, count, n, size, size), dtype=torch.float32)
    room = t.new_empty((min(2, stages), *t.shape), dtype=torch.float32)
    low = same_dtype(turns, t)
    with launching(t):
        for i in reversed(range(stages)):
            _backward[(n, count)](
                t,
                low[i],
                held[max(0, i - 1)],
                grad,
                room[i % len(room)],
                room[(i + 1) % len(room)],
                of_t,
                sums[i],
                len(t),
                n,
                2**i,
                each,
                **_halves(turns),
                FIRST=i == 0,
                LAST=i == stages - 1,
                DEVIATION=deviation,
                num_warps=8,
                num_stages=1,
            )
    return of_t, same_dtype(sums.sum(1), turns)


@_grads.register_fake
def _(t: Tensor, turns: Tensor, grad: Tensor, deviation: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(t), torch.empty_like(turns)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    t, turns, ctx.deviation = inputs
    ctx.save_for_backward(t, turns)


def _pull(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    of_t, of_turns = _grads(*ctx.saved_tensors, grad, ctx.deviation)
    return of_t, of_turns, None


_butterfly.register_autograd(_pull, setup_context=_keep)


def unsuited(t: Tensor, turns: Tensor) -> str:
    """Why the kernels cannot take these; empty if they can."""
    if turns.dim() != 4 or turns.shape[2] != turns.shape[3] or not 0 < turns.shape[2] <= _MOST:
        return f"turns {tuple(turns.shape)}; they are `[m, n, s, s]` with s of at most {_MOST}"
    stages, n, size, _ = turns.shape
    if n < 1 or n & (n - 1) or not 0 < stages <= n.bit_length() or (size % 2 and n > 1) or n * size != t.shape[-1]:
        return f"{stages} stages of {n} blocks of {size} x {size} for {t.shape[-1]} channels"
    return unsuited_tensors(t, turns)


def _through(t: Tensor, turns: Tensor, deviation: bool) -> Tensor:
    check("butterfly", unsuited(t, turns))
    y: Tensor = _butterfly(t.reshape(-1, t.shape[-1]).contiguous(), turns.contiguous(), deviation)
    return y.reshape(t.shape)


def butterfly(t: Tensor, turns: Tensor) -> Tensor:
    """All stages applied to `t` `[..., out]`; turns `[m, n, s, s]` are R - I of each stage and block.

    Raises:
        OptionError: what `unsuited` says.
    """
    return _through(t, turns, False)


def butterfly_deviation(t: Tensor, turns: Tensor) -> Tensor:
    """What all stages together add to `t`, likewise."""
    return _through(t, turns, True)
