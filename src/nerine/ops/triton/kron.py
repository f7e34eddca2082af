"""A Kronecker product applied to the channels of a linear layer's input: y[t, a·b] = x[t, c·d]·(w1 ⊗ w2)ᵀ.

The reference mixes the coarse channels by w1, writes the result, and multiplies it by w2. Here w2 comes first: it is
the product that a matrix unit is made for, and w1 mixes what it leaves in the registers before anything is written.
Backward likewise: the gradient goes through w2, and the same tile gives the gradients of the input and of w1, and the
mixed input from which one more product makes that of w2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from nerine.ops.precision import full_precision, same_dtype
from nerine.ops.triton.launch import check, jit, launching, padded, unsuited_tensors

__all__ = ["kron_linear", "unsuited"]

_MOST = 16  # rows and columns of w1: a tile keeps all of them
_ROWS = 128  # of a product: tokens times coarse channels
_WIDE, _DEEP = 64, 32  # columns of a product, and how many entries it sums at a time


@jit
def _forward(
    x: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    base: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    C: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    BASE: tl.constexpr,
) -> None:
    first = tl.cast(tl.program_id(0), tl.int64) * TOKENS
    fine = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.arange(0, TOKENS * C)
    token, coarse = first + row // C, row % C
    inside = (token < tokens) & (coarse < c)
    total = tl.zeros((TOKENS * C, WIDE), tl.float32)
    for start in range(0, d, DEEP):
        deep = start + tl.arange(0, DEEP)
        at = (token * c + coarse)[:, None] * d + deep[None, :]
        left = tl.load(x + at, mask=inside[:, None] & (deep < d)[None, :], other=0.0)
        mask = (deep < d)[:, None] & (fine < b)[None, :]
        right = tl.load(w2 + fine[None, :] * d + deep[:, None], mask=mask, other=0.0)
        total = tl.dot(left, right, acc=total, input_precision="ieee")
    split = tl.reshape(total, (TOKENS, C, WIDE))
    token = first + tl.arange(0, TOKENS)
    mask = (token < tokens)[:, None] & (fine < b)[None, :]
    for i in range(a):
        mixing = tl.cast(tl.load(w1 + i * c + tl.arange(0, C), mask=tl.arange(0, C) < c, other=0.0), tl.float32)
        out = tl.sum(split * mixing[None, :, None], 1)
        at = (token * a + i)[:, None] * b + fine[None, :]
        if BASE:
            out += tl.cast(tl.load(base + at, mask=mask, other=0.0), tl.float32)
        tl.store(y + at, out, mask=mask)


@jit
def _backward(
    x: tl.tensor,
    w1: tl.tensor,
    w2: tl.tensor,
    grad: tl.tensor,
    grad_x: tl.tensor,
    grad_w1: tl.tensor,
    mixed: tl.tensor,
    tokens: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    A: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    NEED_X: tl.constexpr,
) -> None:
    """A tile of d: grad_x, the mixed input `[tokens, a, d]`, and a part of grad_w1, which is `[programs, c, a]`."""
    first = tl.cast(tl.program_id(0), tl.int64) * TOKENS
    fine = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row = tl.arange(0, TOKENS * A)
    token, coarse = first + row // A, row % A
    inside = (token < tokens) & (coarse < a)
    total = tl.zeros((TOKENS * A, WIDE), tl.float32)
    for start in range(0, b, DEEP):
        deep = start + tl.arange(0, DEEP)
        at = (token * a + coarse)[:, None] * b + deep[None, :]
        left = tl.load(grad + at, mask=inside[:, None] & (deep < b)[None, :], other=0.0)
        mask = (deep < b)[:, None] & (fine < d)[None, :]
        right = tl.load(w2 + deep[:, None] * d + fine[None, :], mask=mask, other=0.0)
        total = tl.dot(left, right, acc=total, input_precision="ieee")
    split = tl.reshape(total, (TOKENS, A, WIDE))
    mix = tl.zeros((TOKENS, A, WIDE), tl.float32)
    token, up = first + tl.arange(0, TOKENS), tl.arange(0, A)
    mask = (token < tokens)[:, None] & (fine < d)[None, :]
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for i in range(c):
        at = (token * c + i)[:, None] * d + fine[None, :]
        here = tl.cast(tl.load(x + at, mask=mask, other=0.0), tl.float32)[:, None, :]
        mixing = tl.cast(tl.load(w1 + up * c + i, mask=up < a, other=0.0), tl.float32)[None, :, None]
        mix += mixing * here
        tl.store(grad_w1 + (program * c + i) * a + up, tl.sum(tl.sum(split * here, 2), 0), mask=up < a)
        if NEED_X:
            tl.store(grad_x + at, tl.sum(split * mixing, 1), mask=mask)
    at = (token[:, None, None] * a + up[None, :, None]) * d + fine[None, None, :]
    inside = (token < tokens)[:, None, None] & (up < a)[None, :, None] & (fine < d)[None, None, :]
    tl.store(mixed + at, mix, mask=inside)


@torch.library.custom_op(
    "nerine::kron_linear", mutates_args=(), schema="(Tensor x, Tensor w1, Tensor w2, Tensor? base) -> Tensor"
)
def _kron(x: Tensor, w1: Tensor, w2: Tensor, base: Tensor | None) -> Tensor:
    """Of contiguous `x` `[tokens, c·d]` and factors."""
    (a, c), (b, d) = w1.shape, w2.shape
    y = x.new_empty((len(x), a * b))
    if len(x):
        tokens = _ROWS // padded(c, 1)
        grid = (-(-len(x) // tokens), -(-b // _WIDE))
        with launching(x):
            _forward[grid](
                x,
                w1,
                same_dtype(w2, x),
                x if base is None else base.contiguous(),
                y,
                len(x),
                a,
                b,
                c,
                d,
                C=padded(c, 1),
                TOKENS=tokens,
                WIDE=_WIDE,
                DEEP=_DEEP,
                BASE=base is not None,
                num_warps=8,
            )
    return y


@_kron.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, base: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], w1.shape[0] * w2.shape[0]))


@torch.library.custom_op(
    "nerine::kron_linear_grad",
    mutates_args=(),
    schema="(Tensor x, Tensor w1, Tensor w2, Tensor grad, bool need_x) -> (Tensor, Tensor, Tensor)",
)
def _grads(x: Tensor, w1: Tensor, w2: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    (a, c), (b, d) = w1.shape, w2.shape
    grad = grad.contiguous()
    of_x = torch.empty_like(x) if need_x else x.new_empty(0)
    mixed = x.new_empty((len(x) * a, d))
    tokens = _ROWS // padded(a, 1)
    grid = (-(-len(x) // tokens), -(-d // _WIDE))
    of_w1 = x.new_empty((grid[0] * grid[1], c, a), dtype=torch.float32)
    if len(x):
        with launching(x):
            _backward[grid](
                x,
                w1,
                same_dtype(w2, x),
                grad,
                of_x,
                of_w1,
                mixed,
                len(x),
                a,
                b,
                c,
                d,
                A=padded(a, 1),
                TOKENS=tokens,
                WIDE=_WIDE,
                DEEP=_DEEP,
                NEED_X=need_x,
                num_warps=8,
            )
    with full_precision(x):
        of_w2 = grad.reshape(-1, b).mT @ mixed
    return of_x, same_dtype(of_w1.sum(0).mT.contiguous(), w1), same_dtype(of_w2, w2)


@_grads.register_fake
def _(x: Tensor, w1: Tensor, w2: Tensor, grad: Tensor, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(w1), torch.empty_like(w2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _pull(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_w1, need_w2, need_base = ctx.needs_input_grad
    of_x, of_w1, of_w2 = _grads(*ctx.saved_tensors, grad, need_x)
    return (
        of_x if need_x else None,
        of_w1 if need_w1 else None,
        of_w2 if need_w2 else None,
        grad if need_base else None,
    )


_kron.register_autograd(_pull, setup_context=_keep)


def unsuited(x: Tensor, w1: Tensor, w2: Tensor, base: Tensor | None = None) -> str:
    """Why the kernel cannot take these; empty if it can."""
    if w1.dim() != 2 or w2.dim() != 2 or x.shape[-1] != w1.shape[1] * w2.shape[1] or not w1.numel() * w2.numel():
        return f"{x.shape[-1]} channels, w1 {tuple(w1.shape)} and w2 {tuple(w2.shape)}: a linear layer has c·d"
    if max(w1.shape) > _MOST:
        return f"w1 {tuple(w1.shape)} has more than {_MOST} rows or columns"
    if base is not None and (base.shape != (*x.shape[:-1], len(w1) * len(w2)) or base.dtype != x.dtype):
        return f"the base is {tuple(base.shape)} in {base.dtype}"
    return unsuited_tensors(x, w1, w2, base)


def kron_linear(x: Tensor, w1: Tensor, w2: Tensor, base: Tensor | None = None) -> Tensor:
    """`x` `[..., c·d]` times (w1 ⊗ w2)ᵀ, plus `base` `[..., a·b]`; w1 `[a, c]` of at most 16 a side, w2 `[b, d]`.

    Raises:
        OptionError: what `unsuited` says.
    """
    check("kron_linear", unsuited(x, w1, w2, base))
    flat = None if base is None else base.reshape(-1, base.shape[-1])
    y: Tensor = _kron(x.reshape(-1, x.shape[-1]).contiguous(), w1.contiguous(), w2.contiguous(), flat)
    return y.reshape(*x.shape[:-1], y.shape[-1])
