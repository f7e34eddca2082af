"""LoRA and LoCon over bare tensors: (down, up, mid), mid None where there is no Tucker core."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nerine.algorithms import LoRA, Params
from nerine.integrations.lycoris.functional.general import check_backend, named, required
from nerine.integrations.lycoris.functional.geometry import call_of
from nerine.ops.precision import full_precision, wide

__all__ = ["bypass_forward_diff", "diff_weight", "weight_gen"]

_LORA = LoRA()


def weight_gen(org_weight: Tensor, rank: int, tucker: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """down, up and mid for `org_weight` `[out, in, *k]`; up is zero, the others as `nn.Linear` starts.

    down is `[rank, in, *k]` and up `[out, rank, 1, ...]`; with `tucker` a convolution has down `[rank, in, 1, ...]` and
    mid `[rank, rank, *k]`.
    """
    out, inputs, *kernel = org_weight.shape
    like, ones = wide(org_weight.new_empty((0,))), [1] * len(kernel)
    up = like.new_zeros((out, rank, *ones))
    if not kernel or not tucker:
        return _started(like.new_empty((rank, inputs, *kernel))), up, None
    down = _started(like.new_empty((rank, inputs, *ones)))
    return down, up, _started(like.new_empty((rank, rank, *kernel)))


def _started(t: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(t, a=math.sqrt(5))


def _params(weights: tuple[Tensor | None, ...], gamma: Any) -> Params:
    down, up, mid = named(weights, "down", "up", "mid")
    core = {} if mid is None else {"mid": mid}
    return Params({"down": required(down, "down"), "up": required(up, "up") * gamma, **core})


def _shape(p: Params) -> tuple[int, ...]:
    widest = p.tensors.get("mid", p.tensors["down"])
    return (p.tensors["up"].shape[0], p.tensors["down"].shape[1], *widest.shape[2:])


def diff_weight(*weights: Tensor | None, gamma: Any = 1.0, backend: str | None = None) -> Tensor:
    """gamma·up·down, or gamma times the kernel of down, mid and up; of (down, up) or (down, up, mid)."""
    check_backend(backend)
    p = _params(weights, gamma)
    with full_precision(p.tensors["up"]):
        return _LORA.delta(p, _shape(p))


def bypass_forward_diff(
    x: Tensor,
    org_out: Tensor | None,
    *weights: Tensor | None,
    gamma: Any = 1.0,
    extra_args: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Tensor:
    """What `diff_weight` adds to the output of the layer for `x`, by the small factors. `org_out` is not used."""
    check_backend(backend)
    p = _params(weights, gamma)
    shape = _shape(p)
    return _LORA.add(p, call_of(x, shape, extra_args or {}, lambda: _LORA.delta(p, shape)))
