"""Products with a weight that is built on the fly, keeping nothing but their inputs for the backward pass.

`contract` is op(prepare(x), build(tensors)); `replay` is any cheap function of tensors. Backward builds again by
replaying autograd, so no algorithm writes its own gradient. Under `torch.compile` both are the plain expression:
the compiler decides what to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nerine.ops.precision import wide

__all__ = ["Operation", "contract", "over_wide", "replay"]


class Operation(Protocol):
    """What `contract` needs of a site."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def add_product(self, into: Tensor, x: Tensor, weight: Tensor) -> Tensor: ...

    def product_grads(
        self, grad: Tensor, x: Tensor, weight: Tensor, need: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]: ...

    def bias_grad(self, grad: Tensor, dtype: torch.dtype) -> Tensor: ...


Build = Callable[..., Tensor]
Prepare = Callable[..., Tensor]


def contract(
    operation: Operation,
    x: Tensor,
    build: Build,
    tensors: Sequence[Tensor],
    prepare: Prepare,
    bias: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """`operation.product(prepare(x, *tensors), build(*tensors), bias)`, keeping only `x` and `tensors` for backward.

    With `into` the product is added to that tensor in place (no bias then), as `Operation.add_product` does.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _product(operation, prepare(x, *tensors), build(*tensors), bias, into)
    return _Contract.apply(operation, prepare, build, bias, into, x, *tensors)  # type: ignore[no-any-return]


def _product(operation: Operation, z: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor | None) -> Tensor:
    return operation.product(z, weight, bias) if into is None else operation.add_product(into, z, weight)


def replay(function: Build, *tensors: Tensor) -> Tensor:
    """`function(*tensors)`, of which only `tensors` are kept: backward runs the function again."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(*tensors)
    return _Replay.apply(function, *tensors)  # type: ignore[no-any-return]


def over_wide(function: Build, weight: Tensor, *tensors: Tensor) -> Tensor:
    """`function(wide(weight), *tensors)` that never keeps a widened copy of a half-precision weight."""
    if wide(weight) is weight:
        return function(weight, *tensors)
    return replay(lambda narrow, *rest: function(wide(narrow), *rest), weight, *tensors)


def _leaves(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]


def _pull(outputs: Sequence[Tensor], grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of `leaves` from those of `outputs`; None where nothing flows."""
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation,
        prepare: Prepare,
        build: Build,
        bias: Tensor | None,
        into: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.operation, ctx.prepare, ctx.build = operation, prepare, build
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, *tensors)
        if into is not None:
            ctx.mark_dirty(into)
        return _product(operation, prepare(x, *tensors), build(*tensors), bias, into)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        leaves = _leaves(ctx.saved_tensors, ctx.needs_input_grad[5:])
        with torch.enable_grad():
            z = ctx.prepare(*leaves)
            weight = ctx.build(*leaves[1:])
        need = (z.requires_grad, weight.requires_grad)
        grads = ctx.operation.product_grads(grad, z.detach(), weight.detach(), need)
        into = grad if ctx.needs_input_grad[4] else None
        gb = ctx.operation.bias_grad(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return (None, None, None, gb, into, *_pull((z, weight), grads, leaves))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Build, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        leaves = _leaves(ctx.saved_tensors, ctx.needs_input_grad[1:])
        with torch.enable_grad():
            out = ctx.function(*leaves)
        return (None, *_pull((out,), (grad,), leaves))
