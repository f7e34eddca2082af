"""The forward of an adapted module, and the ways in which it computes: on another input, with another weight, beside.

Each way is exact; the cheapest that loses nothing in the number format at hand is taken. `through_module` has those for
weights that only their module can use.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nerine.algorithms import Call
from nerine.errors import DeviceError, UnsupportedBase
from nerine.model.adapter import Adapter, Drawn
from nerine.model.lane import Lane, lane_for
from nerine.model.layer import call_site, plain_forward
from nerine.model.mount import USES, Mount, Use, Weight, adapters_of, dtype_at, keep_from_groups, settle
from nerine.model.sharded import check_known_to_engine, drawn_alike, is_split, like, whole
from nerine.model.sums import Share, summed, summed_bias
from nerine.model.through_module import through_module
from nerine.ops.kernel_choice import using
from nerine.ops.precision import compute_dtype, same_dtype
from nerine.ops.recompute import contract
from nerine.site import Site

__all__ = ["adapted_forward", "added"]


def _active(holder: nn.Module, mount: Mount) -> list[Adapter]:
    found = [
        a for name, a in adapters_of(holder, mount) if a.strength and name not in mount.off and name not in mount.merged
    ]
    for adapter in found:
        if adapter.pending:
            settle(holder, mount)
        if adapter.belongs and adapter.has_moved():
            keep_from_groups(adapter)
    return found


def _check_places(is_plain: bool, found: list[tuple[nn.Module, Mount, list[Adapter]]], x: Any) -> None:
    """Whether the input, the weight and the adapters are where they can work together.

    A layer whose forward is not that of its class may move its own weight. Adapters that a host owns come along.

    Raises:
        DeviceError: they are on different devices.
    """
    if not isinstance(x, Tensor):
        return
    for holder, mount, active in found:
        weight: Tensor = holder._parameters[mount.attr]  # type: ignore[assignment]
        if weight.device != x.device and is_plain:
            does = "load its weights" if weight.is_meta else f'call model.to("{x.device}")'
            raise DeviceError(
                f"{mount.path}: the weight is on {weight.device} and its input on {x.device}: {does} first"
            )
        for adapter in active:
            if adapter.belongs and adapter.device != x.device == weight.device:
                raise DeviceError(
                    f"{mount.path}: its adapter is on {adapter.device}, the weight and its input on {x.device}: "
                    f'call network.to("{x.device}"), or move the model as a whole, with its adapters'
                )


def adapted_forward(layer: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of an adapted module; `before` is the instance's own forward from before, if it had one."""
    uses: list[Use] = layer.__dict__[USES]
    if len(uses) == 1 and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
        lane: Lane | None = uses[0][1].lane
        if lane is not None:
            if lane.is_open(args[0]):
                with _kernels_of(lane.adapter):
                    return _along(layer, lane, args[0])
            uses[0][1].lane = None
    base = before if before is not None else functools.partial(type(layer).forward, layer)
    found = [(holder, mount, _active(holder, mount)) for holder, mount in uses]
    if not torch.compiler.is_compiling():  # a flag that changes would make the compiler start again
        for _, mount in uses:
            mount.has_run = True
        for _, mount, active in found:
            for adapter in active:
                check_known_to_engine(mount.path, adapter.parameters(), adapter.belongs)
    if any(_is_served(mount) for _, mount in uses):
        return _served(layer, base, found, args, kwargs)
    if not any(active for *_, active in found):
        return base(*args, **kwargs)
    is_plain = before is None and plain_forward(layer)
    _check_places(is_plain, found, _input_of(args, kwargs))
    if any(is_split(holder._parameters[mount.attr]) for holder, mount, _ in found):
        return _on_mesh(layer, base, found, args, kwargs)
    if any(mount.site.opaque for _, mount, _ in found):
        return through_module(layer, base, found, args, kwargs)
    if len(found) == 1 and found[0][1].rows is None:
        _, mount, active = found[0]
        y = _whole(layer, is_plain, base, mount, active, args, kwargs)
        if is_plain and not torch.compiler.is_compiling():
            mount.lane = lane_for(layer, mount, active)
        return y if mount.site.kind != "embedding" else _without_padding(layer, y, _input_of(args, kwargs))
    y = base(*args, **kwargs)
    for holder, mount, active in found:
        y = _on_rows(y, holder, mount, active, _input_of(args, kwargs))
    return y


def _kernels_of(adapter: Adapter) -> contextlib.AbstractContextManager[object]:
    kernels = adapter.context.kernels
    return using(kernels) if kernels else contextlib.nullcontext()


def _along(layer: nn.Module, lane: Lane, x: Tensor) -> Tensor:
    """`_whole`, with what the lane knows already."""
    base = functools.partial(type(layer).forward, layer)
    y: Tensor = _cheapest(layer, True, base, lane.read(x), [(lane.adapter, lane.tensors(x))], (x,), {})
    return y


def _is_served(mount: Mount) -> bool:
    return mount.served is not None and (torch.compiler.is_compiling() or not mount.served.is_idle())


def _served(
    layer: nn.Module,
    base: Callable[..., Any],
    found: list[tuple[nn.Module, Mount, list[Adapter]]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A layer that also has adapters of samples (`Mount.served`): all of them are added to its own output."""
    x, y = _input_of(args, kwargs), base(*args, **kwargs)
    changed = y
    for holder, mount, active in found:
        weight = Weight(holder, mount, x.device)
        site = call_site(layer, mount.site, args, kwargs)
        call = Call(site, _readable(x, y), y, weight.bias(), weight)
        with weight.unkept():
            for adapter in active:
                changed = changed + same_dtype(_deviation(adapter, adapter(x), call), y)
            more = None if mount.served is None else mount.served.serve(call)
            changed = changed if more is None else changed + same_dtype(more, y)
    return changed


def _whole(
    layer: nn.Module,
    is_plain: bool,
    base: Callable[..., Any],
    mount: Mount,
    active: list[Adapter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A layer whose whole weight has adapters, by the cheapest of the ways that lose nothing."""
    x = _input_of(args, kwargs)
    drawn = [(adapter, adapter(x)) for adapter in active]
    weight = Weight(layer, mount, x.device)
    with weight.unkept(), _kernels_of(active[0]):
        return _cheapest(layer, is_plain, base, weight, drawn, args, kwargs)


def _cheapest(
    layer: nn.Module,
    is_plain: bool,
    base: Callable[..., Any],
    weight: Weight,
    drawn: list[tuple[Adapter, Drawn]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    mount, x = weight.mount, _input_of(args, kwargs)
    site = call_site(layer, mount.site, args, kwargs) if mount.site.kind == "transposed" else mount.site
    if _loses_nothing(x, weight, drawn) and not weight.rounds_input:
        if len(drawn) == 1:
            if mount.kept is not None and mount.kept.weights and drawn[0][1].params.memo is not None:
                return _with_kept_weight(layer, weight, drawn[0], x)
            y = _by_input(base, weight, site, drawn[0], args, kwargs)
            if y is not None:
                return y
        if is_plain and weight.storage is None and any(adapter.takes_weight(x) for adapter, _ in drawn):
            return _weight_path(layer, weight, site, drawn, x)
    y = base(*args, **kwargs)
    if weight.storage is not None and x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
        raise UnsupportedBase(
            f"{mount.path}: the layer ({weight.storage.name}) passes no gradient to its input, so that nothing before "
            "it could learn; train on a base that rounds weights alone, or call the model without gradients"
        )
    return _beside(drawn, Call(site, _readable(x, y), y, weight.bias(), weight, fresh=is_plain))


def _readable(x: Tensor, y: Tensor) -> Tensor:
    """An input that something has cast to a weight's eight bits, in the format of the output: layers under autocast
    take it as it is, and arithmetic does not."""
    return x.to(y.dtype) if x.is_floating_point() and x.dtype.itemsize < 2 else x


def _beside(drawn: list[tuple[Adapter, Drawn]], call: Call) -> Tensor:
    """The layer's output with the deviations of all adapters added."""
    y, ((first, (params, gate)), *others) = call.y, drawn
    if not others and first.is_plain:
        y = first.algorithm.output(params, call if gate is None else replace(call, gate=gate))
        shift = first.algorithm.shift(params)
        return y if shift is None else y + same_dtype(call.site.over_channels(shift), y)
    call = replace(call, fresh=False)  # all of them need it as it is
    for adapter, now in drawn:
        y = y + same_dtype(_deviation(adapter, now, call), y)
    return y


def _by_input(
    base: Callable[..., Any],
    weight: Weight,
    site: Site,
    drawn: tuple[Adapter, Drawn],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The layer's own forward on another input, where the adapter can act so; None where it cannot."""
    (adapter, now), x = drawn, _input_of(args, kwargs)
    strength = None if adapter.is_plain else functools.partial(adapter.call_strength, x)
    found = adapter.algorithm.changed_input(now.params, site, x, weight, strength)
    if found is None:
        return None
    y: Tensor = base(found.x, *args[1:]) if args else base(**{**kwargs, next(iter(kwargs)): found.x})
    shift = adapter.algorithm.shift(now.params)
    if found.then is not None:
        algorithm, p = found.then
        bias = weight.bias()
        y = y + same_dtype(algorithm.deviation(p, Call(site, found.x, y, bias, weight)), y)
    return y if shift is None else y + same_dtype(site.over_channels(shift), y)


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The activation, however it was passed."""
    x: Tensor = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
    return x


def _without_padding(layer: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """No gradient flows from the padding token of an embedding, as in the embedding itself."""
    padding = getattr(layer, "padding_idx", None)
    return y if padding is None else torch.where((x == padding)[..., None], y.detach(), y)


def _loses_nothing(x: Tensor, weight: Weight, drawn: list[tuple[Adapter, Drawn]]) -> bool:
    """Whether a changed weight or input may stand for the deviations.

    Not in half precision, where a small deviation would vanish in the sum; not with dropout, which acts on it; and not
    where the ranks that take part differ within the batch.
    """
    dtype = compute_dtype(x) if x.is_floating_point() else dtype_at(weight.holder, weight.mount)
    if dtype.itemsize < 4:
        return False
    return not any(adapter.has_dropout or now.gate is not None for adapter, now in drawn)


def _deviation(adapter: Adapter, now: Drawn, call: Call) -> Tensor:
    """What one adapter adds to the output, with chance and strength."""
    d = adapter.algorithm.deviation(now.params, replace(call, gate=now.gate))
    shift = adapter.algorithm.shift(now.params)
    if shift is not None:
        d = d + same_dtype(call.site.over_channels(shift), d)
    return adapter.weighted(d)


def added(holder: nn.Module, mount: Mount, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
    """What `adapter` adds to the output `y` of a layer for the input `x`, for hosts that do the adding themselves."""
    weight = Weight(holder, mount, x.device)
    with weight.unkept():
        call = Call(mount.site, _readable(x, y), y, weight.bias(), weight)
        return _deviation(adapter, adapter(x), call)


def _on_mesh(
    layer: nn.Module,
    base: Callable[..., Any],
    found: list[tuple[nn.Module, Mount, list[Adapter]]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """A layer whose weight is split over a mesh of processes (tensor parallel).

    Each of them works out the whole deviation of the gathered input, all alike; so every tensor of an adapter is whole
    in each process and has its whole gradient there.
    """
    out = base(*args, **kwargs)
    x, y = whole(_input_of(args, kwargs)), whole(out)
    for holder, mount, active in found:
        with drawn_alike(holder._parameters[mount.attr], any(adapter.draws for adapter in active)):
            y = _on_rows(y, holder, mount, active, x)
    if found[0][1].site.kind == "embedding":
        y = _without_padding(layer, y, x)
    return like(y, out)


def _on_rows(y: Tensor, holder: nn.Module, mount: Mount, active: list[Adapter], x: Tensor) -> Tensor:
    """`y` with the deviations of adapters on some rows of the weight added to those outputs."""
    if not active:
        return y
    start, stop = mount.rows or (0, mount.site.shape[0])
    dim = y.dim() + mount.site.channel
    part = y.narrow(dim, start, stop - start)
    weight = Weight(holder, mount, x.device)
    call = Call(mount.site, _readable(x, y), part, weight.bias(), weight)
    changed = part
    with weight.unkept():
        for adapter in active:
            changed = changed + same_dtype(_deviation(adapter, adapter(x), call), y)
    if mount.rows is None:
        return changed
    return torch.cat([y.narrow(dim, 0, start), changed, y.narrow(dim, stop, y.shape[dim] - stop)], dim)


def _with_kept_weight(layer: nn.Module, weight: Weight, drawn: tuple[Adapter, Drawn], x: Tensor) -> Tensor:
    """The same with a weight that is built once, while nothing changes."""
    adapter, now = drawn

    def changed() -> tuple[Tensor, Tensor | None]:
        shares: list[Share] = [(adapter, now.params, adapter.strength)]
        build, tensors = summed(shares)
        return build(weight(), *tensors), summed_bias(shares, weight.bias())

    return weight.mount.site.op(x, *now.params.once(f"weight at {adapter.strength}", changed))


def _weight_path(layer: nn.Module, weight: Weight, site: Site, drawn: list[tuple[Adapter, Drawn]], x: Tensor) -> Tensor:
    """op(x, W + Σ strength·(W' - W)) + bias + Σ strength·shift, keeping nothing of the weight's size."""
    shares = [(adapter, now.params, adapter.call_strength(x)) for adapter, now in drawn]
    build, tensors = summed(shares)
    bias = summed_bias(shares, weight.bias())
    return contract(site, x, build, [weight(), *tensors], lambda x, *_: site.prepared(x), bias)
