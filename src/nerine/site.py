"""A site: the shape of one weight and the operation it takes part in (linear or convolution), as plain data.

The site is all that an algorithm knows of a layer. `Site.op` is the layer's own operation with any weight;
`narrow` and `widen` are the two halves of a low-rank product through it. It knows neither modules nor algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from nerine.axes import Sizes
from nerine.ops.precision import compute_dtype, full_precision

__all__ = ["Site"]

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True)
class Site:
    """Shape `[out, in/groups, *k]` and geometry of one weight.

    `padding` is symmetric zero padding that the convolution does itself; `border` is padding done before it, as
    `torch.nn.functional.pad` takes it (last axis first), in the manner of `border_mode`.
    """

    kind: Literal["linear", "conv"]
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    border: tuple[int, ...] = ()
    border_mode: str = "constant"

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def sizes(self) -> Sizes:
        """The axes that the layer fixes: out, in (per group) and the kernel sizes k0, k1, ..."""
        out, inputs, *kernel = self.shape
        return {"out": out, "in": inputs, **{f"k{i}": k for i, k in enumerate(kernel)}}

    @property
    def dense(self) -> int:
        """Multiply-adds of the weight for one output position."""
        return math.prod(self.shape)

    def low_rank_cost(self, rank: int) -> int:
        """Multiply-adds of a low-rank product through this site for one output position."""
        return rank * (self.groups * self.dense // self.shape[0] + self.shape[0])

    @property
    def pointwise(self) -> bool:
        """Whether the kernel has a single tap (always so for a linear layer)."""
        return math.prod(self.kernel) == 1

    def narrow(self, rank: int) -> Site:
        """The first half of a low-rank product: this geometry with `rank` outputs for each group."""
        return replace(self, shape=(self.groups * rank, *self.shape[1:]))

    def widen(self, rank: int) -> Site:
        """The second half: from `rank` channels (in each group) to the outputs, tap by tap."""
        ones = (1,) * len(self.kernel)
        return Site(self.kind, (self.shape[0], rank, *ones), ones, (0,) * len(ones), ones, self.groups)

    def per_group(self, t: Tensor) -> Tensor:
        """Repeat the weight `t` `[rank, in/groups, *k]` for every group, as `narrow` expects it."""
        return t if self.groups == 1 else t.repeat(self.groups, *[1] * (t.dim() - 1))

    # -- channels ------------------------------------------------------------------------------------------------
    @property
    def channel(self) -> int:
        """The (negative) dimension of the channels in an activation."""
        return -1 - len(self.kernel)

    def over_channels(self, v: Tensor) -> Tensor:
        """View `v` `[channels]` so that it multiplies an activation channel by channel."""
        return v.reshape(-1, *[1] * len(self.kernel))

    def over_rows(self, v: Tensor) -> Tensor:
        """View `v` `[out]` so that it multiplies a weight row by row."""
        return v.reshape(-1, *[1] * (len(self.shape) - 1))

    def channels_last(self, t: Tensor) -> Tensor:
        return t.movedim(self.channel, -1)

    def channels_first(self, t: Tensor) -> Tensor:
        return t.movedim(-1, self.channel)

    # -- the operation -------------------------------------------------------------------------------------------
    def op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's operation with another weight, in the number format that `x` asks for."""
        return self.product(self.prepared(x), weight, bias)

    def prepared(self, x: Tensor) -> Tensor:
        """`x` with the border that the convolution does not pad itself."""
        return functional.pad(x, self.border, mode=self.border_mode) if self.border else x

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The operation on an `x` that already has its border."""
        dtype = compute_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if self.kind == "linear":
            return functional.linear(x, weight, bias)
        conv = _CONV[len(self.kernel)]
        return conv(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def add_product(self, into: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Add the product of a linear site to the contiguous `into`, in place; its elements are taken row by row."""
        rows = into.view(-1, weight.shape[0])
        rows.addmm_(x.to(into.dtype).reshape(-1, x.shape[-1]), weight.to(into.dtype).mT)
        return into

    def bias_grad(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradient of a bias `[out]` of that format from the gradient of the output."""
        return self.channels_last(grad).reshape(-1, self.shape[0]).sum(0).to(dtype)

    def product_grads(
        self, grad: Tensor, x: Tensor, weight: Tensor, need: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of `product` to `x` and `weight`, each in the format of its tensor."""
        with full_precision(grad):
            grad = grad.reshape(*x.shape[:-1], -1) if self.kind == "linear" else grad
            gx, gw = self._raw_grads(grad, x.to(grad.dtype), weight.to(grad.dtype), need)
        return None if gx is None else gx.to(x.dtype), None if gw is None else gw.to(weight.dtype)

    def _raw_grads(
        self, grad: Tensor, x: Tensor, weight: Tensor, need: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.kind == "linear":
            gx = grad @ weight if need[0] else None
            gw = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if need[1] else None
            return gx, gw
        single = x.dim() == len(self.kernel) + 1  # a convolution without a batch axis
        if single:
            grad, x = grad[None], x[None]
        zeros: Sequence[int] = [0] * len(self.kernel)
        gx, gw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, self.stride, self.padding, self.dilation, False, zeros, self.groups, [*need, False]
        )
        return gx[0] if single and gx is not None else gx, gw
