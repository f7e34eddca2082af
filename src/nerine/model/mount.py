"""What a module with adapters carries: mounts, one for each adapted weight, and how to reach what is under them.

The module that holds the weight has its mounts in one instance attribute, and the adapters that it owns in a child
module `nerine`. This file only looks and writes values; `attach` puts on and takes off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nerine.algorithms import Call
from nerine.errors import DeviceError, MergeError
from nerine.model.adapter import Adapter, start
from nerine.model.layer import bias_name
from nerine.model.offload import Groups, is_offloaded, offloaded, put_offloaded
from nerine.model.sharded import copy_into, is_split, made_alike, whole
from nerine.model.storage import storage_of
from nerine.ops.precision import same_dtype
from nerine.site import Site

__all__ = [
    "MOUNTS",
    "USES",
    "Kept",
    "Mount",
    "Served",
    "Spot",
    "Use",
    "Weight",
    "adapters_of",
    "bias_at",
    "dtype_at",
    "keep_from_groups",
    "keep_original",
    "mounts_of",
    "names_in",
    "original_at",
    "owned",
    "path_in",
    "settle",
    "weight_at",
    "write",
    "write_back",
]

MOUNTS, USES = "_nerine_mounts", "_nerine_uses"  # instance attributes: of who holds a weight, of whose forward uses it


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
class Kept:
    """What calls without gradients may use again for as long as their tensors are the same: small things, such as norms
    and rotations, and with `weights` also the changed weight."""

    weights: bool = False
    stamp: tuple[tuple[int, int], ...] = ()
    memo: dict[str, Any] = field(default_factory=dict)

    def at(self, tensors: Iterable[Tensor]) -> dict[str, Any]:
        """The memo that belongs to these tensors; an empty one after any has changed in place or moved."""
        stamp = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        if stamp != self.stamp:
            self.stamp, self.memo = stamp, {}
        return self.memo


@dataclass
class Mount:
    """All that is known of one adapted weight beside its modules."""

    path: str  # in the model through which it was first reached; `path_in` tells it for another
    site: Site
    attr: str = "weight"
    rows: tuple[int, int] | None = None
    tail: str = ""  # what the path of the layer has beyond that of the module that holds the weight
    child: str = "nerine"  # the module beside the weight that has the adapters which the layer owns
    loose: dict[str, Adapter] = field(default_factory=dict)  # adapters that a host owns
    off: set[str] = field(default_factory=set)
    merged: dict[str, float] = field(default_factory=dict)  # names and strengths now in the weight
    original: tuple[Tensor, Tensor | None] | None = None  # bits of weight and bias before merging, for `unmerge`
    fingerprint: tuple[torch.dtype, int] | None = None  # of the merged weight, to notice if others change it
    in_group: bool = False  # diffusers takes the weight away after each call, to memory
    shared_with: str = ""  # another module that has the same weight
    served: Served | None = None  # deviations of adapters that are not attached here (see `serving`)
    has_run: bool = False
    kept: Kept | None = None  # while nothing changes (see `Network.cache`)
    lane: Any = None  # the short way through the layer, once the long one has been gone (see `lane`)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "lane": None, "served": None, "kept": None}  # a copy finds its own


Use = tuple[nn.Module, Mount]


class Served(Protocol):
    """What adds to the output of a layer without being an adapter of it."""

    def is_idle(self) -> bool:
        """Whether it has nothing to add now, so that nobody need ask."""
        ...

    def serve(self, call: Call) -> Tensor | None:
        """What is added to the output of one call; None for nothing."""
        ...


def mounts_of(module: nn.Module) -> list[Mount]:
    """The mounts of the weights that `module` holds."""
    return list(module.__dict__.get(MOUNTS, {}).values())


def path_in(holder_path: str, mount: Mount) -> str:
    """The path of the layer in a model in which its holder is at `holder_path`."""
    rows = "" if mount.rows is None else f"[{mount.rows[0]}:{mount.rows[1]}]"
    return ".".join(filter(None, (holder_path, mount.tail))) + rows


def owned(holder: nn.Module, mount: Mount) -> nn.ModuleDict:
    """The child that holds the adapters which the layer owns."""
    owned: nn.ModuleDict = getattr(holder, mount.child)
    return owned


def adapters_of(holder: nn.Module, mount: Mount) -> Iterator[tuple[str, Adapter]]:
    """The named adapters of a mount, in the order in which they were put on (those a host owns last).

    Here an engine that has taken an adapter for one more layer of the model gives it back: an adapter is small, is
    trained, and stays where its layer computes.
    """
    if mount.child in holder._modules:
        for name, adapter in owned(holder, mount).items():
            if "_hf_hook" in adapter.__dict__ or "_diffusers_hook" in adapter.__dict__:
                adapter.reclaim()  # type: ignore[operator]
            yield name, adapter  # type: ignore[misc]
    for name, adapter in mount.loose.items():
        if adapter.belongs and adapter.training != holder.training:
            adapter.train(holder.training)
        yield name, adapter


def names_in(model: nn.Module) -> list[str]:
    """The names of all adapters in a model, each once, in the order in which they are met."""
    mounts = ((holder, mount) for holder in model.modules() for mount in mounts_of(holder))
    return list(dict.fromkeys(name for holder, mount in mounts for name, _ in adapters_of(holder, mount)))


_LOOKS = 3  # for engines, when adapters have moved: a first time, and again where some come later


def keep_from_groups(adapter: Adapter) -> None:
    """Take the adapters of a model out of the groups in which diffusers moves its parameters.

    A parameter that leaves the device between forward and backward cannot be trained; a group also writes old values
    from its files over new ones. Called where an adapter has moved, which mostly means nothing of the kind.
    """
    context = adapter.context
    model = None if context.model is None else context.model()
    if model is None or context.looks >= _LOOKS:
        return
    context.looks += 1
    groups = Groups(model)
    for holder in model.modules():
        for mount in mounts_of(holder):
            for name, own in list(adapters_of(holder, mount)):
                if groups.groups and name not in mount.loose:
                    _keep_from(groups, holder, mount, name, own)
                own.has_moved()  # seen, wherever it is now


def _keep_from(groups: Groups, holder: nn.Module, mount: Mount, name: str, adapter: Adapter) -> None:
    device = groups.device_of(next(adapter.parameters()))
    if device is None:
        return
    children = owned(holder, mount)
    del children[name]
    if not len(children):
        del holder._modules[mount.child]
    mount.loose[name] = adapter
    mount.in_group = groups.in_memory(holder._parameters[mount.attr])
    groups.let_go([*adapter.parameters(), *adapter.buffers()])
    adapter.place(device)


def settle(holder: nn.Module, mount: Mount) -> None:
    """Give adapters that were made without a real weight their tensors, once there is one."""
    for _, adapter in adapters_of(holder, mount):
        if adapter.pending:
            weight = weight_at(holder, mount)
            if not weight.is_meta:
                if adapter.was_split and not is_split(getattr(adapter, adapter.names[0])):
                    raise DeviceError(
                        f"{mount.path}: fully_shard came before the adapter had values, and a forward is too late for "
                        "them: call network.settle() in every process once the weights are loaded"
                    )
                is_new = adapter.pending == "start"
                fresh = start(adapter.algorithm, adapter.site, weight.detach(), None) if is_new else None
                if fresh is not None:
                    fresh = fresh.filled(made_alike(holder._parameters[mount.attr], fresh.tensors.values()))
                adapter.settle(fresh, weight.device)


# -- the weight under a mount ------------------------------------------------------------------------------------
def _stored(holder: nn.Module, attr: str) -> Tensor | None:
    """A parameter as it is stored; the value that an engine keeps of it where it has emptied the parameter itself."""
    own = holder._parameters.get(attr)
    if own is not None and own.is_meta:
        held = offloaded(holder, attr)
        return own if held is None else held
    return own


def _read(holder: nn.Module, mount: Mount | Spot, stored: Tensor) -> Tensor:
    storage = storage_of(holder, stored)
    weight = mount.site.canonical(stored if storage is None else storage.read(holder, stored))
    return weight if mount.rows is None else weight[mount.rows[0] : mount.rows[1]]


def weight_at(holder: nn.Module, mount: Mount | Spot) -> Tensor:
    """The weight `[out, in/groups, *k]` under a mount; a view of the module's own where that is an ordinary tensor."""
    stored = _stored(holder, mount.attr)
    assert stored is not None
    return _read(holder, mount, stored)


class Weight:
    """The weight under a mount for one call of its layer: read when it is asked for, and not before.

    It comes as a tensor of its own, for an engine may exchange the memory of the parameter before backward runs. What
    has to be made of a stored form (see `storage`), or brought to the device for each call, is not kept for backward:
    within `unkept` it is read again there.
    """

    def __init__(self, holder: nn.Module, mount: Mount, device: torch.device) -> None:
        self.holder, self.mount, self.device = holder, mount, device
        self.stored = _stored(holder, mount.attr)
        self.storage = storage_of(holder, self.stored)
        self.is_away = mount.in_group or is_offloaded(holder)  # between the calls
        self.made: Tensor | None = None
        self.is_known = False

    @classmethod
    def ordinary(cls, holder: nn.Module, mount: Mount, device: torch.device) -> Weight:
        """The same where weight and bias are known to be ordinary parameters that stay where they are."""
        found = cls.__new__(cls)
        found.holder, found.mount, found.device = holder, mount, device
        found.stored = holder._parameters[mount.attr]
        found.storage, found.is_away, found.made, found.is_known = None, False, None, True
        return found

    def bias(self) -> Tensor | None:
        """The bias that belongs to it, as `bias_at` gives it."""
        if not self.is_known:
            return bias_at(self.holder, self.mount)
        bias = self.holder._parameters.get(bias_name(self.mount.attr))
        return bias if bias is None or bias.requires_grad else bias.detach()

    def __call__(self) -> Tensor:
        if self.made is None:
            stored = _stored(self.holder, self.mount.attr) if self.stored is None else self.stored
            assert stored is not None
            weight = _read(self.holder, self.mount, stored)
            weight = weight if weight.device == self.device else weight.to(self.device)
            self.made = weight if weight.requires_grad else weight.detach()
        return self.made

    @property
    def rounds_input(self) -> bool:
        """Whether the layer rounds its input as well as its weight."""
        return self.storage is not None and self.storage.rounds_input(self.holder, self.stored)  # type: ignore[arg-type]

    def unkept(self) -> contextlib.AbstractContextManager[object]:
        """A context in which autograd keeps no weight that can be read again.

        Gradient checkpointing has hooks of its own on what is kept, and keeps nothing: they are left alone.
        """
        if (self.storage is None and not self.is_away) or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return contextlib.nullcontext()
        return self._unkept()

    @contextlib.contextmanager
    def _unkept(self) -> Iterator[None]:
        if self.is_away:
            self()  # so that it is known wherever it is kept
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self.made = None  # for the hooks live as long as what they have saved, and this with them
        self.stored = None if self.is_away else self.stored

    def _pack(self, t: Tensor) -> Any:
        made = self.made
        if made is None or type(t) not in (Tensor, nn.Parameter):  # others may have no memory of their own to ask for
            return t
        if t.untyped_storage().data_ptr() != made.untyped_storage().data_ptr():
            return t
        again = Weight(self.holder, self.mount, self.device)
        again.stored = None if self.is_away else self.stored
        return again, t.shape, t.stride(), t.storage_offset()

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        again, *geometry = packed
        weight: Tensor = again().as_strided(*geometry)
        again.made = None
        return weight


def original_at(holder: nn.Module, mount: Mount) -> Tensor:
    """The same, as it was before a merge."""
    if mount.original is None:
        return weight_at(holder, mount)
    kept = mount.original[0]
    return _read(holder, replace(mount, rows=None), kept) if mount.rows is None else kept


def dtype_at(holder: nn.Module, mount: Mount) -> torch.dtype:
    """The number format of that weight, without making anything of it."""
    dtype: torch.dtype = holder._parameters[mount.attr].dtype  # type: ignore[union-attr]
    return dtype


def bias_at(holder: nn.Module, mount: Mount | Spot) -> Tensor | None:
    """The bias that belongs to it, or None; like a `Weight` a tensor of its own."""
    bias = _stored(holder, bias_name(mount.attr))
    if bias is None:
        return None
    bias = whole(bias)
    if storage_of(holder, bias) is not None:
        bias = bias.to(torch.float32)
    bias = bias if bias.requires_grad else bias.detach()
    return bias if mount.rows is None else bias[mount.rows[0] : mount.rows[1]]


def keep_original(holder: nn.Module, mount: Mount) -> None:
    """Remember what is under a mount, for `write_back`."""
    stored, bias = _stored(holder, mount.attr), bias_at(holder, mount)
    assert stored is not None
    if mount.rows is not None:
        kept = weight_at(holder, mount).detach().clone()
    else:  # what cannot be written in place is replaced, so that the old one is kept as it is
        storage = storage_of(holder, stored)
        kept = stored.detach().clone() if storage is None or storage.in_place else stored
    mount.original = kept, None if bias is None else bias.detach().clone()


@torch.no_grad()
def write_back(holder: nn.Module, mount: Mount) -> None:
    """Put the bits back that `keep_original` has kept."""
    assert mount.original is not None
    kept, bias = mount.original
    is_here = not holder._parameters[mount.attr].is_meta  # type: ignore[union-attr]
    storage = storage_of(holder, kept)
    if storage is not None and not storage.in_place and mount.rows is None and is_here:
        holder._parameters[mount.attr] = kept  # type: ignore[assignment]
        _write_bias(holder, mount, bias)
    else:
        write(holder, mount, mount.site.canonical(kept) if mount.rows is None else kept, bias)
    mount.original = None


@torch.no_grad()
def write(holder: nn.Module, mount: Mount, weight: Tensor, bias: Tensor | None) -> None:
    """Put other values under a mount: in the memory of the old ones, or stored anew in the way they were.

    Raises:
        MergeError: the way in which the weight is stored cannot take others.
    """
    own = holder._parameters[mount.attr]
    assert own is not None
    storage = storage_of(holder, own)
    if own.is_meta or storage is not None:
        _store(holder, mount, mount.site.native(weight))
    elif mount.rows is None:
        own.copy_(mount.site.native(weight))
    else:
        weight_at(holder, mount).copy_(weight)
    _write_bias(holder, mount, bias)


def _store(holder: nn.Module, mount: Mount, weight: Tensor) -> None:
    """Put a weight in the module's own form where it cannot be written in place."""
    own = holder._parameters[mount.attr]
    assert own is not None
    if mount.rows is not None:
        raise MergeError(
            f"{mount.path}: rows of a weight that is offloaded, quantised or split cannot be merged by themselves"
        )
    if own.is_meta:
        if offloaded(holder, mount.attr) is None:
            raise DeviceError(f"{mount.path}: its weight is on meta, without values; load the model's weights first")
        put_offloaded(holder, mount.attr, weight)
        return
    storage = storage_of(holder, own)
    assert storage is not None
    if storage.write is None:
        raise MergeError(f"{mount.path}: {storage.refusal}")
    try:
        holder._parameters[mount.attr] = storage.write(holder, own, weight)
    except MergeError as error:
        raise MergeError(f"{mount.path}: {error}") from None


def _write_bias(holder: nn.Module, mount: Mount, bias: Tensor | None) -> None:
    slot = bias_name(mount.attr)
    own = holder._parameters.get(slot)
    if own is None and bias is not None:  # a layer made without one gets it for as long as it is merged
        like = bias if storage_of(holder, holder._parameters[mount.attr]) else holder._parameters[mount.attr]
        holder._parameters[slot] = nn.Parameter(same_dtype(bias, like), requires_grad=False)  # type: ignore[arg-type]
    elif own is not None and bias is None:
        holder._parameters[slot] = None
    elif own is not None and bias is not None:
        if own.is_meta:
            put_offloaded(holder, slot, bias)
        else:
            target = own if mount.rows is None else own[mount.rows[0] : mount.rows[1]]
            copy_into(target, bias)
