"""A site: the shape of one weight and the operation it takes part in (linear, convolution, ...), as plain data.

The site is all that an algorithm knows of a layer. `Site.op` is the layer's own operation with any weight;
a low-rank product through it is `op` with as many outputs as ranks, then `spread`. A weight always stands as
`[out, in/groups, *k]` here; `canonical` and `native` go from and to the way in which its module keeps it. The site
knows neither modules nor algorithms.
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
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


@dataclass(frozen=True)
class Site:
    """Shape `[out, in/groups, *k]` and geometry of one weight.

    `padding` is symmetric zero padding that the convolution does itself; `border` is padding done before it, as
    `torch.nn.functional.pad` takes it (last axis first), in the manner of `border_mode`. An embedding has the tokens
    as its input channels; a norm has shape `[out, ...]` and no input channels. `has_bias` says whether there is a bias
    to move, `flipped` that the module keeps the last two axes of the weight the other way round, and `opaque` that
    only the module itself can compute with the weight. With `experts` the parameter holds that many such weights.
    """

    kind: Literal["linear", "conv", "transposed", "embedding", "norm"]
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    border: tuple[int, ...] = ()
    border_mode: str = "constant"
    output_padding: tuple[int, ...] = ()
    has_bias: bool = False
    flipped: bool = False
    opaque: bool = False
    experts: int = 0

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[1:] if self.kind == "norm" else self.shape[2:]

    @property
    def sizes(self) -> Sizes:
        """The axes that the layer fixes: out, in (per group) and the kernel sizes k0, k1, ...

        A norm over several axes counts all but the first as kernel.
        """
        kernel = {f"k{i}": k for i, k in enumerate(self.kernel)}
        return {"out": self.shape[0], **({} if self.kind == "norm" else {"in": self.shape[1]}), **kernel}

    @property
    def flat(self) -> int:
        """Length of a row of the weight: in/groups times the taps of the kernel."""
        return self.dense // self.shape[0]

    @property
    def dense(self) -> int:
        """Multiply-adds of the weight for one output position."""
        return math.prod(self.shape)

    def low_rank_cost(self, rank: int) -> int:
        """Multiply-adds of a low-rank product through this site for one output position."""
        first = 0 if self.kind == "embedding" else self.groups * self.flat
        return rank * (first + self.shape[0])

    @property
    def pointwise(self) -> bool:
        """Whether the kernel has a single tap (always so for a linear layer)."""
        return math.prod(self.kernel) == 1

    def widen(self, rank: int) -> Site:
        """The second half: from `rank` channels (in each group) to the outputs, tap by tap."""
        if not self.kernel:
            return Site("linear", (self.shape[0], rank))
        ones = (1,) * len(self.kernel)
        return Site("conv", (self.shape[0], rank, *ones), ones, (0,) * len(ones), ones, self.groups)

    def spread(self, h: Tensor, up: Tensor) -> Tensor:
        """The second half of a low-rank product: `h`, of as many channels (in each group) as `up` `[out, rank, *1]` has
        ranks, at the outputs."""
        if not self.kernel:
            return functional.linear(h, up.to(h.dtype))
        conv = _CONV[len(self.kernel)]
        return conv(h, up.to(h.dtype), groups=self.groups)

    def with_inputs(self, count: int) -> Site:
        """This geometry with `count` input channels in each group."""
        return replace(self, shape=(self.shape[0], count, *self.kernel))

    def rows(self, count: int) -> Site:
        """This site with `count` of its outputs."""
        return replace(self, shape=(count, *self.shape[1:]))

    def per_group(self, t: Tensor) -> Tensor:
        """Repeat the weight `t` `[rank, in/groups, *k]` for every group, each with `rank` outputs."""
        return t if self.groups == 1 else t.repeat(self.groups, *[1] * (t.dim() - 1))

    # -- how the module keeps the weight --------------------------------------------------------------------------
    def canonical(self, weight: Tensor) -> Tensor:
        """The weight `[out, in/groups, *k]` from the module's own; a view where there is one."""
        if self.flipped:
            return weight.mT
        return self._turned(weight) if self.kind == "transposed" else weight

    def native(self, weight: Tensor) -> Tensor:
        """The way back from `canonical`; both exchange the same two axes."""
        return self.canonical(weight)

    def _turned(self, weight: Tensor) -> Tensor:
        """Exchange the channels of a transposed convolution's weight, group by group."""
        if self.groups == 1:
            return weight.transpose(0, 1)
        grouped: Tensor = weight.reshape(self.groups, -1, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)

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
        if self.kind == "embedding":
            return functional.embedding(x, weight.mT)
        dtype = compute_dtype(x)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if self.kind == "linear":
            return functional.linear(x, weight, bias)
        if self.kind == "transposed":
            conv_transpose = _TRANSPOSED[len(self.kernel)]
            weight = self.native(weight)
            return conv_transpose(
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
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
        if self.kind == "embedding":
            gw = torch.ops.aten.embedding_dense_backward(grad, x, weight.shape[1], -1, False).mT if need[1] else None
            return None, None if gw is None else gw.to(weight.dtype)
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
        turned = self.kind == "transposed"
        extra: Sequence[int] = self.output_padding if turned else [0] * len(self.kernel)
        gx, gw, _ = torch.ops.aten.convolution_backward(
            grad,
            x,
            self.native(weight),
            None,
            self.stride,
            self.padding,
            self.dilation,
            turned,
            extra,
            self.groups,
            [*need, False],
        )
        gw = None if gw is None else self.canonical(gw)
        return gx[0] if single and gx is not None else gx, gw
