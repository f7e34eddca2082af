"""Weights that only their own module can use: norms, attention, experts, layers with a forward of their own.

For the length of a call the module finds the changed weight where its own is. Where its forward f is affine in the
weight, half precision and dropout get f(x; W' - W) - f(x; 0) beside it, so that nothing small is lost in a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nerine.errors import OptionError
from nerine.model.adapter import Adapter
from nerine.model.layer import bias_name, is_layer, plain_forward
from nerine.model.mount import Mount, bias_at, dtype_at, weight_at
from nerine.model.sums import summed, summed_bias
from nerine.ops.precision import full_precision, same_dtype, wide
from nerine.ops.recompute import replay

__all__ = ["through_module"]


@contextmanager
def _shadows(values: list[tuple[nn.Module, dict[str, Tensor | None]]]) -> Iterator[None]:
    """For the length of a call, other tensors in place of parameters and buffers."""
    try:
        for module, tensors in values:
            module.__dict__.update(tensors)
        yield
    finally:
        for module, tensors in values:
            for name in tensors:
                module.__dict__.pop(name, None)


def through_module(
    layer: nn.Module,
    base: Callable[..., Any],
    found: list[tuple[nn.Module, Mount, list[Adapter]]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The module's own forward with changed weights; in half precision and with dropout beside it, where that goes."""
    adapters = [adapter for *_, active in found for adapter in active]
    if any(adapter.is_per_sample for adapter in adapters):
        raise OptionError(f"{found[0][1].path}: ranks that differ within a batch need a layer whose output is open")
    inputs = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
    x = next(inputs, weight_at(found[0][0], found[0][1]))
    half = any(dtype_at(holder, mount).itemsize < 4 for holder, mount, _ in found)
    is_affine = is_layer(layer)  # every layer is, in weight and bias; owners of parameters need not be
    if is_affine and (half or any(adapter.has_dropout for adapter in adapters)):
        return _beside_module(layer, base, found[0][1], adapters, x, args, kwargs)
    values: dict[int, tuple[nn.Module, dict[str, Tensor | None]]] = {}
    for holder, mount, active in found:
        if active:
            shares = [(adapter, adapter(x).params, adapter.call_strength(x)) for adapter in active]
            build, tensors = summed(shares)
            changed = replay(build, weight_at(holder, mount), *tensors)
            bias = summed_bias(shares, bias_at(holder, mount))
            inside = values.setdefault(id(holder), (holder, {}))[1]
            inside.update(_in_place_of(holder, mount, changed, bias, inside))
    with _shadows(list(values.values())):
        return base(*args, **kwargs)


def _beside_module(
    layer: nn.Module,
    base: Callable[..., Any],
    mount: Mount,
    adapters: list[Adapter],
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """y + Σ f(x; W' - W) - f(x; 0) for a forward f that is affine in its weight: nothing small is lost in a sum."""
    y = base(*args, **kwargs)
    weight, bias = weight_at(layer, mount), bias_at(layer, mount)
    buffers: dict[str, Tensor | None] = {n: b.clone() for n, b in layer._buffers.items() if b is not None}

    def own(weight: Tensor, bias: Tensor | None) -> Any:
        with _shadows([(layer, {**buffers, **_in_place_of(layer, mount, weight, bias)})]):
            return base(*args, **kwargs)

    none = None if bias is None else torch.zeros_like(bias)
    empty = None if plain_forward(layer) else own(torch.zeros_like(weight), none)
    for adapter in adapters:
        p = adapter(x).params
        shift = adapter.algorithm.shift(p)
        with full_precision(weight):
            change = adapter.weight_deviation(p, wide(weight))
        d = own(change, shift if shift is not None else none)
        d = d if empty is None else d - empty
        y = y + same_dtype(adapter.weighted(d), y)
    return y


def _in_place_of(
    holder: nn.Module,
    mount: Mount,
    weight: Tensor,
    bias: Tensor | None,
    before: Mapping[str, Tensor | None] = MappingProxyType({}),
) -> dict[str, Tensor | None]:
    """A changed weight and bias in the form of the module's own, by their names; other rows as they were `before`."""
    found: dict[str, Tensor | None] = {}
    for attr, changed in ((mount.attr, weight), (bias_name(mount.attr), bias)):
        own = holder._parameters.get(attr)
        if changed is None:
            continue
        is_weight = attr == mount.attr
        like: Tensor = holder._parameters[mount.attr]  # type: ignore[assignment]
        whole = like.new_zeros(changed.shape) if own is None else own
        if mount.rows is not None:
            start, stop = mount.rows
            now = before.get(attr)
            whole = whole if now is None else now
            whole = mount.site.canonical(whole) if is_weight else whole
            changed = torch.cat([whole[:start], same_dtype(changed, like), whole[stop:]])
        found[attr] = same_dtype(mount.site.native(changed) if is_weight else changed, like)
    return found
