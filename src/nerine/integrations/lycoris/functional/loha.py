"""LoHa over bare tensors: (w1d, w1u, w2d, w2u, t1, t2), the last two None where there are no Tucker cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nerine.algorithms import LoHa, Params
from nerine.integrations.lycoris.functional.general import check_backend, named, required
from nerine.integrations.lycoris.functional.geometry import call_of
from nerine.ops.precision import full_precision, wide

__all__ = ["bypass_forward_diff", "diff_weight", "make_weight", "make_weight_tucker", "weight_gen"]

_LOHA = LoHa()
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def weight_gen(org_weight: Tensor, rank: int, tucker: bool = True) -> Six:
    """w1d, w1u, w2d, w2u, t1 and t2 for `org_weight` `[out, in, *k]`; w1u is zero, the others are normal.

    Downs are `[rank, in, *k]` and ups `[out, rank]`; with `tucker` a convolution has downs `[rank, in]`, ups
    `[rank, out]` and cores `[rank, rank, *k]`.
    """
    out, inputs, *kernel = org_weight.shape
    like = wide(org_weight.new_empty((0,)))
    t1 = t2 = None
    down, up = (rank, inputs, *kernel), (out, rank)
    if kernel and tucker:
        down, up = (rank, inputs), (rank, out)
        t1, t2 = (like.new_empty((rank, rank, *kernel)).normal_(std=0.1) for _ in range(2))
    w1d, w1u = like.new_empty(down).normal_(), like.new_zeros(up)
    w2d, w2u = like.new_empty(down).normal_(), like.new_empty(up).normal_(std=0.1)
    return w1d, w1u, w2d, w2u, t1, t2


def make_weight(w1d: Tensor, w1u: Tensor, w2d: Tensor, w2u: Tensor, scale: Any) -> Tensor:
    """scale·(w1u·w1d) ∘ (w2u·w2d) `[out, in]`."""
    return diff_weight(w1d, w1u, w2d, w2u, None, None, gamma=scale)


def make_weight_tucker(
    t1: Tensor, w1d: Tensor, w1u: Tensor, t2: Tensor, w2d: Tensor, w2u: Tensor, scale: Any
) -> Tensor:
    """scale times the entrywise product of two Tucker kernels `[out, in, *k]`."""
    return diff_weight(w1d, w1u, w2d, w2u, t1, t2, gamma=scale)


def _params(weights: tuple[Tensor | None, ...], gamma: Any) -> tuple[Params, tuple[int, ...]]:
    """The tensors under nerine's names, and the shape of the weight that they make."""
    *four, t1, t2 = named(weights, "w1d", "w1u", "w2d", "w2u", "t1", "t2")
    w1d, w1u, w2d, w2u = (required(t, name) for t, name in zip(four, ("w1d", "w1u", "w2d", "w2u"), strict=True))
    if t1 is not None and t2 is not None:
        tensors = {"t1": t1, "w1_a": w1u * gamma, "w1_b": w1d, "t2": t2, "w2_a": w2u, "w2_b": w2d}
        return Params(tensors), (w1u.shape[1], w1d.shape[1], *t1.shape[2:])
    shape = (w1u.shape[0], *w1d.shape[1:])
    tensors = {"w1_a": w1u.flatten(1) * gamma, "w1_b": w1d.flatten(1), "w2_a": w2u.flatten(1), "w2_b": w2d.flatten(1)}
    return Params(tensors), shape


def diff_weight(*weights: Tensor | None, gamma: Any = 1.0, backend: str | None = None) -> Tensor:
    """gamma·(w1u·w1d) ∘ (w2u·w2d), each with its core where it has one; of four tensors, or of six."""
    check_backend(backend)
    p, shape = _params(weights, gamma)
    with full_precision(p.tensors["w1_a"]):
        return _LOHA.delta(p, shape)


def bypass_forward_diff(
    x: Tensor,
    org_out: Tensor | None,
    *weights: Tensor | None,
    gamma: Any = 1.0,
    extra_args: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Tensor:
    """What `diff_weight` adds to the output of the layer for `x`. `org_out` is not used."""
    check_backend(backend)
    p, shape = _params(weights, gamma)
    return _LOHA.add(p, call_of(x, shape, extra_args or {}, lambda: _LOHA.delta(p, shape)))
