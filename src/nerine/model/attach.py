"""Putting adapters on a model's modules and taking them off.

An adapted module keeps its class, its weights and its keys. The module that holds the weight gets a `Mount` and a child
module `nerine` with the adapters it owns; the module whose forward uses the weight (mostly the same one) gets one
instance attribute `forward`, inside the hooks of accelerate and diffusers. A mount may also have no adapter of its own
and be served from elsewhere (see `serving`). Removing the last of these removes all.
"""

from __future__ import annotations

import functools
import itertools
import types

from torch import nn

from nerine.errors import OptionError
from nerine.model.adapter import Adapter
from nerine.model.forward import adapted_forward
from nerine.model.merge import unmerge_layer
from nerine.model.mount import MOUNTS, USES, Mount, Served, Spot, adapters_of, mounts_of, owned
from nerine.model.offload import forward_slots, innermost

__all__ = ["check_free", "put_on", "serve", "stop_serving", "take_off"]


def check_free(spots: list[Spot]) -> None:
    """Whether adapters can go to `spots` without meeting others on part of the same rows.

    Raises:
        OptionError: two ranges of rows overlap without being the same: a merge of one changes what the other reads.
    """
    by_weight: dict[tuple[int, str], list[Spot | Mount]] = {}
    for spot in spots:
        there = by_weight.setdefault((id(spot.holder), spot.attr), [])
        there += [spot] if there else [*(m for m in mounts_of(spot.holder) if m.attr == spot.attr), spot]
    for there in by_weight.values():
        for one, two in itertools.combinations(there, 2):
            if one.rows != two.rows and _overlap(one.rows, two.rows):
                raise OptionError(f"{two.path} and {one.path} overlap: give adapters the same rows, or rows apart")


def _overlap(one: tuple[int, int] | None, two: tuple[int, int] | None) -> bool:
    return one is None or two is None or (one[0] < two[1] and two[0] < one[1])


def put_on(spot: Spot, name: str, adapter: Adapter, own: bool) -> None:
    """Give the weight at `spot` the adapter `name`; a child beside the weight if `own`, else only referred to.

    Raises:
        OptionError: there already is an adapter of that name.
    """
    holder = spot.holder
    mount = holder.__dict__.get(MOUNTS, {}).get(spot.key)
    if mount is not None and name in dict(adapters_of(holder, mount)):
        raise OptionError(
            f"{spot.path} already has an adapter called {name!r}; detach it first, or choose another name"
        )
    mount = _mount_at(spot)
    adapter.train(holder.training)
    if own:
        if mount.child not in holder._modules:
            holder.add_module(mount.child, nn.ModuleDict())
        owned(holder, mount)[name] = adapter
    else:
        mount.loose[name] = adapter


def _mount_at(spot: Spot) -> Mount:
    """The mount of the weight at `spot`; where there was none, one without adapters, and our forward in its caller."""
    holder, caller = spot.holder, spot.caller or spot.holder
    mounts: dict[str, Mount] = holder.__dict__.setdefault(MOUNTS, {})
    if spot.key in mounts:
        return mounts[spot.key]
    tail = spot.attr if spot.caller is holder else ""
    child = "nerine" if spot.key == "weight" else f"nerine_{spot.key}"
    mount = mounts[spot.key] = Mount(spot.path, spot.site, spot.attr, spot.rows, tail, child)
    uses = caller.__dict__.setdefault(USES, [])
    if not uses:
        (space, key), before = innermost(caller)
        space[key] = functools.partial(adapted_forward, caller, before)
    uses.append((holder, mount))
    return mount


def serve(spot: Spot, served: Served) -> Mount:
    """Let `served` say what is added to the output of the layer at `spot`, beside the adapters that it may have.

    Raises:
        OptionError: something else serves that layer.
    """
    mount = spot.holder.__dict__.get(MOUNTS, {}).get(spot.key)
    if mount is not None and mount.served is not None:
        raise OptionError(
            f"{spot.path} is served by another shelf: add its adapters to that one, or detach it before this one comes"
        )
    mount = _mount_at(spot)
    mount.served = served
    return mount


def stop_serving(spot: Spot) -> None:
    """Undo `serve`; without adapters of its own the layer loses every trace of nerine."""
    mount = spot.holder.__dict__.get(MOUNTS, {}).get(spot.key)
    if mount is None:
        return
    mount.served = None
    if next(adapters_of(spot.holder, mount), None) is None:
        _forget(spot.caller or spot.holder, spot.holder, mount)


def take_off(caller: nn.Module, name: str) -> None:
    """Remove the adapter `name` from the weights that `caller` uses; with the last one, every trace of nerine
    (unless the weight is served from elsewhere).

    A merged weight gets its bits back, unless it was merged for good (`keep_original=False`).
    """
    for holder, mount in list(caller.__dict__.get(USES, [])):
        if name in mount.merged and mount.original is not None:
            unmerge_layer(holder, mount, {name})
        mount.merged.pop(name, None)  # merged for good: the weight stays as it is
        if mount.child in holder._modules and name in owned(holder, mount):
            del owned(holder, mount)[name]
            if not len(owned(holder, mount)):
                del holder._modules[mount.child]
        mount.loose.pop(name, None)
        mount.off.discard(name)
        if mount.served is None and next(adapters_of(holder, mount), None) is None:
            _forget(caller, holder, mount)


def _forget(caller: nn.Module, holder: nn.Module, mount: Mount) -> None:
    mounts: dict[str, Mount] = holder.__dict__[MOUNTS]
    holder.__dict__[MOUNTS] = {key: m for key, m in mounts.items() if m is not mount}
    caller.__dict__[USES] = [use for use in caller.__dict__[USES] if use[1] is not mount]
    if not holder.__dict__[MOUNTS]:
        del holder.__dict__[MOUNTS]
    if not caller.__dict__[USES]:
        del caller.__dict__[USES]
        _restore_forward(caller)


def _restore_forward(layer: nn.Module) -> None:
    """Take our forward out of whatever holds it now; hooks that came later are around it."""
    for space, key in forward_slots(layer):
        ours = space.get(key)
        if isinstance(ours, functools.partial) and ours.func is adapted_forward:
            before = ours.args[1]
            if space is layer.__dict__ and key == "forward" and before is None:
                del space[key]
            else:
                space[key] = types.MethodType(type(layer).forward, layer) if before is None else before
