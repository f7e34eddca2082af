"""Diag-OFT over bare tensors: (oft_blocks `[n, s, s]`, rescale `[out, 1, ...]` or None).

`constraint` bounds |B - Bᵀ| over all blocks as it is; LyCORIS's modules pass constraint·out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nerine.algorithms import Params
from nerine.algorithms.diag_oft import turned_and_rescaled
from nerine.errors import ShapeError
from nerine.integrations.lycoris.functional.general import check_backend, factorization, named, required
from nerine.ops.blocks import turn_channels
from nerine.ops.cayley import bounded, cayley, skew
from nerine.ops.precision import wide

__all__ = ["bypass_forward_diff", "diff_weight", "get_r", "weight_gen"]


def get_r(oft_blocks: Tensor, I: Tensor | None = None, constraint: float | None = 0) -> Tensor:
    """The orthogonal matrices R = (I + Q)·(I - Q)⁻¹ of `oft_blocks` `[..., s, s]`. `I` is the unit matrix, if given."""
    turn = turns(oft_blocks, constraint)
    return turn + (torch.diag_embed(torch.ones_like(turn[..., 0])) if I is None else I.to(turn.dtype))


def turns(oft_blocks: Tensor, constraint: float | None) -> Tensor:
    """R - I, in at least fp32."""
    return cayley(bounded(skew(wide(oft_blocks)), constraint or 0.0))


def weight_gen(org_weight: Tensor, max_block_size: int = -1, rescale: bool = False) -> tuple[Tensor, Tensor | None]:
    """Blocks of zeros for `org_weight` `[out, ...]`, and with `rescale` a factor of one for each output.

    Blocks have the size of `factorization(out, max_block_size)`: at most that where it is no divisor.
    """
    out, *rest = org_weight.shape
    size, count = factorization(out, max_block_size)
    like = wide(org_weight.new_empty((0,)))
    gain = like.new_ones((out, *[1] * len(rest))) if rescale else None
    return like.new_zeros((count, size, size)), gain


def change(t: Tensor, turned: Tensor, rescale: Tensor | None) -> Tensor:
    """The deviation of `t` `[..., out]` from that of the turn and the factors of the outputs."""
    return turned_and_rescaled(Params({} if rescale is None else {"rescale": rescale}), t, turned)


def diff_weight(
    org_weight: Tensor, *weights: Tensor | None, constraint: float | None = None, backend: str | None = None
) -> Tensor:
    """rescale ∘ (Rᵀ·W) - W, in at least fp32."""
    check_backend(backend)
    blocks, rescale = named(weights, "oft_blocks", "rescale")
    rows = wide(org_weight).movedim(0, -1)
    return _turned(rows, blocks, rescale, constraint).movedim(-1, 0)


def bypass_forward_diff(
    x: Tensor | None,
    org_out: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    need_transpose: bool = False,
    backend: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """What `diff_weight` adds to the layer's output `org_out`, in at least fp32. `x` is not used.

    The channels are the last axis, with `need_transpose` the second. The bias is no part of the weight and is not
    turned: give the `bias` that `org_out` has in it, or `org_out` without.
    """
    check_backend(backend)
    blocks, rescale = named(weights, "oft_blocks", "rescale")
    d = _turned(outputs(org_out, need_transpose, bias), blocks, rescale, constraint)
    return d.movedim(-1, 1) if need_transpose else d


def outputs(org_out: Tensor, need_transpose: bool, bias: Tensor | None) -> Tensor:
    """The layer's output with its channels last and without its bias, in at least fp32."""
    y = wide(org_out)
    y = y.movedim(1, -1) if need_transpose else y
    return y if bias is None else y - wide(bias)


def check_blocks(blocks: Tensor, t: Tensor) -> None:
    """Whether blocks `[..., n, s, s]` have as many channels as `t` `[..., out]`.

    Raises:
        ShapeError: they have not.
    """
    count, size = blocks.shape[-3:-1]
    if count * size != t.shape[-1]:
        raise ShapeError(f"oft_blocks: {count} blocks of {size} are {count * size} channels, expected {t.shape[-1]}")


def _turned(t: Tensor, blocks: Tensor | None, rescale: Tensor | None, constraint: float | None) -> Tensor:
    turn = turns(required(blocks, "oft_blocks"), constraint)
    check_blocks(turn, t)
    return change(t, turn_channels(t, turn), rescale)
