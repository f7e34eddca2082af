"""How an adapter sits on a layer: the changed forward, which way it computes, merging and taking off.

An adapted module keeps its class, its weights and its keys. The module that holds the weight gets a `Mount` and a child
module `nerine` with the adapters it owns; the module whose forward uses the weight (mostly the same one) gets one
instance attribute `forward`, inside the hooks of accelerate where there are any. Removing the last adapter removes all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from nerine.algorithms import Call, Params
from nerine.errors import MergeError, OptionError
from nerine.model.adapter import Adapter, Drawn
from nerine.model.layer import bias_name, call_site, is_affine, plain_forward
from nerine.ops.precision import compute_dtype, full_precision, same_dtype, wide
from nerine.ops.recompute import contract, replay
from nerine.site import Site

__all__ = [
    "Mount",
    "Spot",
    "adapters_of",
    "changed_weight",
    "forget_original",
    "merge_layer",
    "mounts_of",
    "put_on",
    "take_off",
    "unmerge_layer",
    "weight_at",
]

_MOUNTS, _USES = "_nerine_mounts", "_nerine_uses"


@dataclass(frozen=True)
class Spot:
    """Where an adapter goes: the weight `attr` of `holder`, or some of its rows, used in the forward of `caller`."""

    path: str
    holder: nn.Module
    site: Site
    attr: str = "weight"
    rows: tuple[int, int] | None = None
    caller: nn.Module | None = None

    @property
    def key(self) -> str:
        return self.attr if self.rows is None else f"{self.attr}_{self.rows[0]}_{self.rows[1]}"


@dataclass
class Mount:
    """All that is known of one adapted weight beside its modules."""

    path: str
    site: Site
    attr: str = "weight"
    rows: tuple[int, int] | None = None
    child: str = "nerine"  # the module beside the weight that has the adapters which the layer owns
    loose: dict[str, Adapter] = field(default_factory=dict)  # adapters that a host owns
    off: set[str] = field(default_factory=set)
    merged: dict[str, float] = field(default_factory=dict)  # names and strengths now in the weight
    original: tuple[Tensor, Tensor | None] | None = None  # bits of weight and bias before merging, for `unmerge`
    shared_with: str = ""  # another module that has the same weight
    has_run: bool = False


Use = tuple[nn.Module, Mount]


def mounts_of(module: nn.Module) -> list[Mount]:
    """The mounts of the weights that `module` holds."""
    return list(module.__dict__.get(_MOUNTS, {}).values())


def _owned(holder: nn.Module, mount: Mount) -> nn.ModuleDict:
    """The child that holds the adapters which the layer owns."""
    owned: nn.ModuleDict = getattr(holder, mount.child)
    return owned


def adapters_of(holder: nn.Module, mount: Mount) -> Iterator[tuple[str, Adapter]]:
    """The named adapters of a mount, in the order in which they were put on (those a host owns last)."""
    if mount.child in holder._modules:
        yield from _owned(holder, mount).items()  # type: ignore[misc]
    if mount.loose:
        yield from mount.loose.items()


# -- the weight under a mount ------------------------------------------------------------------------------------
def weight_at(holder: nn.Module, mount: Mount | Spot) -> Tensor:
    """The weight `[out, in/groups, *k]` under a mount; a view of the module's own where there is one."""
    weight = mount.site.canonical(holder._parameters[mount.attr])  # type: ignore[arg-type]
    return weight if mount.rows is None else weight[mount.rows[0] : mount.rows[1]]


def bias_at(holder: nn.Module, mount: Mount) -> Tensor | None:
    """The bias that belongs to it, or None."""
    bias = holder._parameters.get(bias_name(mount.attr))
    return bias if bias is None or mount.rows is None else bias[mount.rows[0] : mount.rows[1]]


@torch.no_grad()
def _write(holder: nn.Module, mount: Mount, weight: Tensor, bias: Tensor | None) -> None:
    """Put other values under a mount, in the memory of the old ones."""
    own: Tensor = holder._parameters[mount.attr]  # type: ignore[assignment]
    if mount.rows is None:
        own.copy_(mount.site.native(weight))
    else:
        weight_at(holder, mount).copy_(weight)
    target, slot = bias_at(holder, mount), bias_name(mount.attr)
    if target is not None and bias is not None:
        target.copy_(bias)
    elif target is None and bias is not None:  # a layer made without one gets it for as long as it is merged
        holder._parameters[slot] = nn.Parameter(same_dtype(bias, own), requires_grad=False)
    elif target is not None:
        holder._parameters[slot] = None


# -- putting on and taking off -----------------------------------------------------------------------------------
def put_on(spot: Spot, name: str, adapter: Adapter, own: bool) -> None:
    """Give the weight at `spot` the adapter `name`; a child beside the weight if `own`, else only referred to.

    Raises:
        OptionError: there already is an adapter of that name, or one on some of the same rows.
    """
    holder, caller = spot.holder, spot.caller or spot.holder
    mounts = holder.__dict__.setdefault(_MOUNTS, {})
    mount = mounts.get(spot.key)
    if mount is not None and name in dict(adapters_of(holder, mount)):
        raise OptionError(
            f"{spot.path} already has an adapter called {name!r}; detach it first, or choose another name"
        )
    if mount is None:
        child = "nerine" if spot.key == "weight" else f"nerine_{spot.key}"
        mount = mounts[spot.key] = Mount(spot.path, spot.site, spot.attr, spot.rows, child)
        uses = caller.__dict__.setdefault(_USES, [])
        if not uses:
            slot = _slot(caller)
            caller.__dict__[slot] = functools.partial(adapted_forward, caller, caller.__dict__.get(slot))
        uses.append((holder, mount))
    adapter.train(holder.training)
    if own:
        if mount.child not in holder._modules:
            holder.add_module(mount.child, nn.ModuleDict())
        _owned(holder, mount)[name] = adapter
    else:
        mount.loose[name] = adapter


def take_off(caller: nn.Module, name: str) -> None:
    """Remove the adapter `name` from the weights that `caller` uses; with the last one, every trace of nerine.

    A merged weight gets its bits back, unless it was merged for good (`keep_original=False`).
    """
    for holder, mount in list(caller.__dict__.get(_USES, [])):
        if name in mount.merged and mount.original is not None:
            unmerge_layer(holder, mount, {name})
        mount.merged.pop(name, None)  # merged for good: the weight stays as it is
        if mount.child in holder._modules and name in _owned(holder, mount):
            del _owned(holder, mount)[name]
            if not len(_owned(holder, mount)):
                del holder._modules[mount.child]
        mount.loose.pop(name, None)
        mount.off.discard(name)
        if next(adapters_of(holder, mount), None) is None:
            _forget(caller, holder, mount)


def _forget(caller: nn.Module, holder: nn.Module, mount: Mount) -> None:
    mounts: dict[str, Mount] = holder.__dict__[_MOUNTS]
    holder.__dict__[_MOUNTS] = {key: m for key, m in mounts.items() if m is not mount}
    caller.__dict__[_USES] = [use for use in caller.__dict__[_USES] if use[1] is not mount]
    if not holder.__dict__[_MOUNTS]:
        del holder.__dict__[_MOUNTS]
    if not caller.__dict__[_USES]:
        del caller.__dict__[_USES]
        _restore_forward(caller)


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
def _active(holder: nn.Module, mount: Mount) -> list[Adapter]:
    return [
        a for name, a in adapters_of(holder, mount) if a.strength and name not in mount.off and name not in mount.merged
    ]


def adapted_forward(layer: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of an adapted module; `before` is the instance's own forward from before, if it had one."""
    uses: list[Use] = layer.__dict__[_USES]
    base = before if before is not None else functools.partial(type(layer).forward, layer)
    found = [(holder, mount, _active(holder, mount)) for holder, mount in uses]
    if not torch.compiler.is_compiling():  # a flag that changes would make the compiler start again
        for _, mount in uses:
            mount.has_run = True
    if not any(active for *_, active in found):
        return base(*args, **kwargs)
    if any(mount.site.opaque for _, mount, _ in found):
        return _through_module(layer, base, found, args, kwargs)
    if len(found) == 1 and found[0][1].rows is None:
        _, mount, active = found[0]
        y = _whole(layer, before, base, mount, active, args, kwargs)
        return y if mount.site.kind != "embedding" else _without_padding(layer, y, _input_of(args, kwargs))
    y = base(*args, **kwargs)
    for holder, mount, active in found:
        y = _on_rows(y, holder, mount, active, _input_of(args, kwargs))
    return y


def _whole(
    layer: nn.Module,
    before: Callable[..., Any] | None,
    base: Callable[..., Any],
    mount: Mount,
    active: list[Adapter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A layer whose whole weight has adapters, by the cheapest of the ways that lose nothing."""
    site = call_site(layer, mount.site, args, kwargs) if mount.site.kind == "transposed" else mount.site
    x = _input_of(args, kwargs)
    drawn = [(adapter, adapter(x)) for adapter in active]
    alone = active[0] if len(active) == 1 else None
    if _loses_nothing(x, weight_at(layer, mount), drawn):
        if alone is not None:
            y = _by_input(layer, base, mount, site, (alone, drawn[0][1]), args, kwargs)
            if y is not None:
                return y
        if before is None and any(adapter.prefers_weight for adapter in active) and plain_forward(layer):
            return _weight_path(layer, mount, site, drawn, x)
    y = base(*args, **kwargs)
    call = Call(site, x, y, bias_at(layer, mount), lambda: weight_at(layer, mount))
    if alone is not None and alone.is_plain:
        fresh, (_, (params, gate)) = before is None and plain_forward(layer), drawn[0]
        y = alone.algorithm.output(params, replace(call, fresh=fresh, gate=gate))
        shift = alone.algorithm.shift(params)
        return y if shift is None else y + same_dtype(site.over_channels(shift), y)
    for adapter, now in drawn:
        y = y + same_dtype(_deviation(adapter, now, call), y)
    return y


def _by_input(
    layer: nn.Module,
    base: Callable[..., Any],
    mount: Mount,
    site: Site,
    drawn: tuple[Adapter, Drawn],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The layer's own forward on another input, where the adapter can act so; None where it cannot."""
    (adapter, now), x = drawn, _input_of(args, kwargs)
    strength = None if adapter.is_plain else functools.partial(adapter.call_strength, x)
    weight = functools.partial(weight_at, layer, mount)
    found = adapter.algorithm.changed_input(now.params, site, x, weight, strength)
    if found is None:
        return None
    y: Tensor = base(found.x, *args[1:]) if args else base(**{**kwargs, next(iter(kwargs)): found.x})
    shift = adapter.algorithm.shift(now.params)
    if found.then is not None:
        algorithm, p = found.then
        y = y + same_dtype(algorithm.deviation(p, Call(site, found.x, y, bias_at(layer, mount), weight)), y)
    return y if shift is None else y + same_dtype(site.over_channels(shift), y)


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The activation, however it was passed."""
    x: Tensor = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
    return x


def _without_padding(layer: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """No gradient flows from the padding token of an embedding, as in the embedding itself."""
    padding = getattr(layer, "padding_idx", None)
    return y if padding is None else torch.where((x == padding)[..., None], y.detach(), y)


def _loses_nothing(x: Tensor, weight: Tensor, drawn: list[tuple[Adapter, Drawn]]) -> bool:
    """Whether a changed weight or input may stand for the deviations.

    Not in half precision, where a small deviation would vanish in the sum; not with dropout, which acts on it; and not
    where the ranks that take part differ within the batch.
    """
    dtype = compute_dtype(x) if x.is_floating_point() else weight.dtype
    full = dtype.itemsize >= 4
    return full and not any(adapter.has_dropout or now.gate is not None for adapter, now in drawn)


def _deviation(adapter: Adapter, now: Drawn, call: Call) -> Tensor:
    """What one adapter adds to the output, with chance and strength."""
    d = adapter.algorithm.deviation(now.params, replace(call, gate=now.gate))
    shift = adapter.algorithm.shift(now.params)
    if shift is not None:
        d = d + same_dtype(call.site.over_channels(shift), d)
    return adapter.weighted(d)


def _on_rows(y: Tensor, holder: nn.Module, mount: Mount, active: list[Adapter], x: Tensor) -> Tensor:
    """`y` with the deviations of adapters on some rows of the weight added to those outputs."""
    if not active:
        return y
    start, stop = mount.rows or (0, mount.site.shape[0])
    dim = y.dim() + mount.site.channel
    part = y.narrow(dim, start, stop - start)
    call = Call(mount.site, x, part, bias_at(holder, mount), lambda: weight_at(holder, mount))
    changed = part
    for adapter in active:
        changed = changed + same_dtype(_deviation(adapter, adapter(x), call), y)
    return torch.cat([y.narrow(dim, 0, start), changed, y.narrow(dim, stop, y.shape[dim] - stop)], dim)


def _weight_path(layer: nn.Module, mount: Mount, site: Site, drawn: list[tuple[Adapter, Drawn]], x: Tensor) -> Tensor:
    """op(x, W + Σ strength·(W' - W)) + bias + Σ strength·shift, keeping nothing of the weight's size."""
    shares = [(adapter, now.params, adapter.call_strength(x)) for adapter, now in drawn]
    build, tensors = _summed(shares)
    bias = _summed_bias(shares, bias_at(layer, mount))
    return contract(site, x, build, [weight_at(layer, mount), *tensors], lambda x, *_: site.prepared(x), bias)


Share = tuple[Adapter, Params, Tensor | float]


def _summed(shares: list[Share]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of the weight and of all tensors that gives W + Σ strength·(W' - W) in at least fp32; the tensors."""
    first = shares[0][0]
    is_plain = len(shares) == 1 and first.is_plain and not first.site.experts

    def build(weight: Tensor, *values: Tensor) -> Tensor:
        with full_precision(weight):
            if is_plain:
                return first.algorithm.weight(shares[0][1].filled(values), weight)
            rest = iter(values)
            filled = [(adapter, p.filled(next(rest) for _ in p.tensors), s) for adapter, p, s in shares]
            return _changed(wide(weight), filled)

    return build, [t for _, p, _ in shares for t in p.tensors.values()]


def _changed(weight: Tensor, shares: list[Share]) -> Tensor:
    """W + Σ strength·(W' - W) of a weight in at least fp32."""
    total = weight
    for adapter, p, strength in shares:
        total = total + adapter.weight_deviation(p, weight) * strength
    return total


def _summed_bias(shares: list[Share], bias: Tensor | None) -> Tensor | None:
    """The bias with all shifts, in at least fp32 where there are any."""
    for adapter, p, strength in shares:
        shift = adapter.algorithm.shift(p)
        if shift is not None:
            bias = shift * strength if bias is None else wide(bias) + shift * strength
    return bias


# -- weights that only their module can use ----------------------------------------------------------------------
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


def _through_module(
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
    half = any(weight_at(holder, mount).dtype.itemsize < 4 for holder, mount, _ in found)
    if is_affine(layer) and (half or any(adapter.has_dropout for adapter in adapters)):
        return _beside_module(layer, base, found[0][1], adapters, x, args, kwargs)
    values: dict[int, tuple[nn.Module, dict[str, Tensor | None]]] = {}
    for holder, mount, active in found:
        if active:
            shares = [(adapter, adapter(x).params, adapter.call_strength(x)) for adapter in active]
            build, tensors = _summed(shares)
            changed = replay(build, weight_at(holder, mount), *tensors)
            bias = _summed_bias(shares, bias_at(holder, mount))
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
        d = own(change, none if shift is None else shift)
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


# -- merging -----------------------------------------------------------------------------------------------------
def changed_weight(holder: nn.Module, mount: Mount, names: set[str]) -> tuple[Tensor, Tensor | None]:
    """W + Σ strength·(W' - W) over the adapters `names`, as one sum in at least fp32; the bias likewise."""
    weight, bias = wide(weight_at(holder, mount).detach()), bias_at(holder, mount)
    bias = None if bias is None else wide(bias.detach())
    with torch.no_grad(), full_precision(weight):
        shares: list[Share] = []
        for name, adapter in adapters_of(holder, mount):
            if name in names and adapter.strength:
                p = adapter.folded()
                shares.append((adapter, p.filled(t.to(weight.device) for t in p.tensors.values()), adapter.strength))
        return _changed(weight, shares), _summed_bias(shares, bias)


def merge_layer(holder: nn.Module, mount: Mount, names: set[str]) -> tuple[float, float]:
    """Put the adapters `names` into the weight, rounded once; returns the largest and the relative rounding error.

    Raises:
        MergeError: one of them is merged already, another active adapter reads the weight, or another module shares it.
    """
    names = names & {name for name, _ in adapters_of(holder, mount)}
    if mount.merged:
        both = ", ".join(sorted(mount.merged))
        raise MergeError(f"{mount.path}: {both} is merged already; unmerge before merging again")
    if mount.shared_with:
        raise MergeError(
            f"{mount.path} shares its weight with {mount.shared_with}, which a merge would change as well; "
            "give the two a weight of their own first, or leave the layer out"
        )
    others = sorted(n for n, a in adapters_of(holder, mount) if n not in names and n not in mount.off and a.strength)
    if others:
        raise MergeError(
            f"{mount.path}: {', '.join(others)} is applied to the weight that would change under it; merge both "
            "together with Network.of(model).merge(), or take it off first"
        )
    weight, bias = weight_at(holder, mount).detach(), bias_at(holder, mount)
    exact, shifted = changed_weight(holder, mount, names)
    rounded = exact.to(weight.dtype)
    if not torch.isfinite(rounded).all():
        raise MergeError(f"{mount.path}: the merged weight is not finite in {weight.dtype}; is the adapter damaged?")
    step, error = exact - wide(weight), wide(rounded) - exact
    mount.original = (weight.clone(), None if bias is None else bias.detach().clone())
    _write(holder, mount, rounded, shifted)
    mount.merged = {name: a.strength for name, a in adapters_of(holder, mount) if name in names}
    return float(error.abs().max()), float(error.norm() / step.norm().clamp_min(1e-30))


def forget_original(mount: Mount) -> None:
    """Make a merge final: the old bits are dropped."""
    mount.original = None


def unmerge_layer(holder: nn.Module, mount: Mount, names: set[str]) -> None:
    """Give the weight back its exact bits.

    Raises:
        MergeError: it was merged without keeping them.
    """
    if not mount.merged or not (names & set(mount.merged)):
        return
    if mount.original is None:
        raise MergeError(f"{mount.path}: it was merged with keep_original=False, so the original bits are gone")
    _write(holder, mount, *mount.original)
    mount.merged, mount.original = {}, None
