"""How an adapter sits on a layer: the changed forward, which way it computes, merging and taking off.

An adapted layer keeps its class, its weight and its keys. It gets one instance attribute `forward` (inside the hooks
of accelerate, where there are any), a child module `nerine` with the adapters it owns, and a `Mount` with the rest.
Removing the last adapter removes all three.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nerine.algorithms import Call, Params
from nerine.errors import MergeError, OptionError
from nerine.model.adapter import Adapter
from nerine.model.layer import bias_of, plain_forward, weight_of
from nerine.ops.precision import compute_dtype, full_precision, wide
from nerine.ops.recompute import contract
from nerine.site import Site

__all__ = [
    "Mount",
    "adapters_of",
    "changed_weight",
    "forget_original",
    "merge_layer",
    "mount_of",
    "put_on",
    "take_off",
    "unmerge_layer",
]

_MOUNT = "_nerine_mount"


@dataclass
class Mount:
    """All that is known of one adapted layer beside its modules."""

    path: str
    site: Site
    loose: dict[str, Adapter] = field(default_factory=dict)  # adapters that a host owns
    off: set[str] = field(default_factory=set)
    merged: dict[str, float] = field(default_factory=dict)  # names and strengths now in the weight
    original: Tensor | None = None  # the weight's bits before merging, for `unmerge`


def mount_of(layer: nn.Module) -> Mount | None:
    """The mount of an adapted layer, or None."""
    mount = layer.__dict__.get(_MOUNT)
    return mount if isinstance(mount, Mount) else None


def _owned(layer: nn.Module) -> nn.ModuleDict:
    """The child that holds the adapters which the layer owns."""
    owned: nn.ModuleDict = layer.nerine  # type: ignore[assignment]
    return owned


def adapters_of(layer: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The named adapters of a layer, in the order in which they were put on (those a host owns last)."""
    if "nerine" in layer._modules:
        yield from _owned(layer).items()  # type: ignore[misc]
    mount = mount_of(layer)
    if mount is not None and mount.loose:
        yield from mount.loose.items()


# -- putting on and taking off -----------------------------------------------------------------------------------
def put_on(layer: nn.Module, path: str, site: Site, name: str, adapter: Adapter, own: bool) -> None:
    """Give `layer` the adapter `name`; the layer's own child if `own`, else only referred to.

    Raises:
        OptionError: the layer already has an adapter of that name.
    """
    if name in dict(adapters_of(layer)):
        raise OptionError(f"{path} already has an adapter called {name!r}; detach it first, or choose another name")
    mount = mount_of(layer)
    if mount is None:
        mount = Mount(path, site)
        layer.__dict__[_MOUNT] = mount
        slot = _slot(layer)
        before = layer.__dict__.get(slot)
        layer.__dict__[slot] = functools.partial(adapted_forward, layer, before)
    adapter.train(layer.training)
    if own:
        if "nerine" not in layer._modules:
            layer.add_module("nerine", nn.ModuleDict())
        _owned(layer)[name] = adapter
    else:
        mount.loose[name] = adapter


def take_off(layer: nn.Module, name: str) -> None:
    """Remove the adapter `name`; with the last one, every trace of nerine.

    A merged weight gets its bits back, unless it was merged for good (`keep_original=False`).
    """
    mount = mount_of(layer)
    if mount is None:
        return
    if name in mount.merged and mount.original is not None:
        unmerge_layer(layer, {name})
    mount.merged.pop(name, None)  # merged for good: the weight stays as it is
    if "nerine" in layer._modules and name in _owned(layer):
        del _owned(layer)[name]
        if not len(_owned(layer)):
            del layer._modules["nerine"]
    mount.loose.pop(name, None)
    mount.off.discard(name)
    if next(adapters_of(layer), None) is None:
        _restore_forward(layer)
        del layer.__dict__[_MOUNT]


def _slot(layer: nn.Module) -> str:
    """The attribute that holds the forward to replace: accelerate's hooks keep the real one in `_old_forward`."""
    return "_old_forward" if "_hf_hook" in layer.__dict__ and "_old_forward" in layer.__dict__ else "forward"


def _restore_forward(layer: nn.Module) -> None:
    for slot in ("forward", "_old_forward"):
        ours = layer.__dict__.get(slot)
        if isinstance(ours, functools.partial) and ours.func is adapted_forward:
            before = ours.args[1]
            if before is not None:
                layer.__dict__[slot] = before
            elif slot == "forward":
                del layer.__dict__[slot]
            else:
                layer.__dict__[slot] = functools.partial(type(layer).forward, layer)


# -- the changed forward -----------------------------------------------------------------------------------------
def adapted_forward(layer: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of an adapted layer; `before` is the instance's own forward from before, if it had one."""
    mount: Mount = layer._nerine_mount  # type: ignore[assignment]
    active = [a for name, a in adapters_of(layer) if a.strength and name not in mount.off and name not in mount.merged]
    base = before if before is not None else functools.partial(type(layer).forward, layer)
    if not active:
        return base(*args, **kwargs)
    x = args[0] if args else kwargs["input"]
    if before is None and _through_weight(layer, active, x):
        return _weight_path(layer, mount.site, active, x)
    y = base(*args, **kwargs)
    call = Call(mount.site, x, y, bias_of(layer), lambda: weight_of(layer))
    if len(active) == 1 and active[0].is_plain:
        fresh = before is None and plain_forward(layer)
        return active[0].algorithm.output(active[0](x), replace(call, fresh=fresh))
    for adapter in active:
        y = y + adapter.weighted(adapter.algorithm.deviation(adapter(x), call))
    return y


def _through_weight(layer: nn.Module, active: list[Adapter], x: Tensor) -> bool:
    """Whether one product with the changed weight is cheaper and loses nothing.

    Not in half precision, where a small deviation would vanish in the sum with the weight, and not with dropout,
    which acts on the deviation.
    """
    if not any(adapter.prefers_weight for adapter in active) or compute_dtype(x).itemsize < 4:
        return False
    return plain_forward(layer) and not any(a.training and a.noise.dropout for a in active)


def _weight_path(layer: nn.Module, site: Site, active: list[Adapter], x: Tensor) -> Tensor:
    """op(x, W + Σ strength·(W' - W)) + bias, keeping nothing of the weight's size."""
    shares = [(a.algorithm, a(x), a.call_strength(x)) for a in active]
    flat = [t for _, p, _ in shares for t in p.tensors.values()]

    def build(weight: Tensor, *values: Tensor) -> Tensor:
        rest = iter(values)
        base = wide(weight)
        total = base
        with full_precision(weight):
            if len(shares) == 1 and isinstance(shares[0][2], float) and shares[0][2] == 1.0:
                algorithm, p, _ = shares[0]
                return algorithm.weight(Params(dict(zip(p.tensors, values, strict=True)), p.scale), weight)
            for algorithm, p, strength in shares:
                params = Params({name: next(rest) for name in p.tensors}, p.scale)
                total = total + algorithm.weight_deviation(params, base) * strength
        return total

    prepare = (lambda x, *_: site.prepared(x)) if site.border else (lambda x, *_: x)
    return contract(site, x, build, [weight_of(layer), *flat], prepare, bias_of(layer))


# -- merging -----------------------------------------------------------------------------------------------------
def changed_weight(layer: nn.Module, names: set[str]) -> Tensor:
    """W + Σ strength·(W' - W) over the adapters `names`, as one sum in at least fp32."""
    weight = wide(weight_of(layer).detach())
    total = weight
    with torch.no_grad(), full_precision(weight):
        for name, adapter in adapters_of(layer):
            if name in names and adapter.strength:
                p = adapter.folded()
                tensors = {key: t.to(weight.device) for key, t in p.tensors.items()}
                total = total + adapter.algorithm.weight_deviation(Params(tensors, p.scale), weight) * adapter.strength
    return total


def merge_layer(layer: nn.Module, names: set[str]) -> tuple[float, float]:
    """Put the adapters `names` into the weight, rounded once; returns the largest and the relative rounding error.

    Raises:
        MergeError: one of them is merged already, or another active adapter reads the weight.
    """
    mount = mount_of(layer)
    assert mount is not None
    here = {name for name, _ in adapters_of(layer)}
    names = names & here
    if mount.merged:
        both = ", ".join(sorted(mount.merged))
        raise MergeError(f"{mount.path}: {both} is merged already; unmerge before merging again")
    others = sorted(n for n, a in adapters_of(layer) if n not in names and n not in mount.off and a.strength)
    if others:
        raise MergeError(
            f"{mount.path}: {', '.join(others)} is applied to the weight that would change under it; merge both "
            "together with Network.of(model).merge(), or take it off first"
        )
    exact = changed_weight(layer, names)
    rounded = exact.to(weight_of(layer).dtype)
    if not torch.isfinite(rounded).all():
        raise MergeError(
            f"{mount.path}: the merged weight is not finite in {weight_of(layer).dtype}; is the adapter damaged?"
        )
    step = exact - wide(weight_of(layer).detach())
    error = wide(rounded) - exact
    mount.original = weight_of(layer).detach().clone()
    with torch.no_grad():
        weight_of(layer).copy_(rounded)
    mount.merged = {name: a.strength for name, a in adapters_of(layer) if name in names}
    return float(error.abs().max()), float(error.norm() / step.norm().clamp_min(1e-30))


def forget_original(layer: nn.Module) -> None:
    """Make a merge final: the old bits are dropped."""
    mount = mount_of(layer)
    if mount is not None:
        mount.original = None


def unmerge_layer(layer: nn.Module, names: set[str]) -> None:
    """Give the weight back its exact bits.

    Raises:
        MergeError: it was merged without keeping them.
    """
    mount = mount_of(layer)
    if mount is None or not mount.merged or not (names & set(mount.merged)):
        return
    if mount.original is None:
        raise MergeError(f"{mount.path}: it was merged with keep_original=False, so the original bits are gone")
    with torch.no_grad():
        weight_of(layer).copy_(mount.original)
    mount.merged, mount.original = {}, None
