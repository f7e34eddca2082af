"""The short way through an adapted layer: what the long way has found is kept, and only asked whether it still holds.

Most layers have one adapter, an ordinary weight and no engine around them, call after call. A lane is that finding; it
is open while every fact in it is seen to be unchanged, and whoever finds it closed takes the long way. It decides
nothing by itself, so both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nerine.algorithms import Params
from nerine.model.adapter import Adapter, Drawn
from nerine.model.layer import bias_name
from nerine.model.mount import Mount, Weight
from nerine.model.storage import storage_of

__all__ = ["Lane", "lane_for"]

_KINDS = ("linear", "conv", "transposed")
_ENGINES = ("_hf_hook", "_diffusers_hook", "ds_id")  # what accelerate, diffusers and ZeRO-3 leave on modules
_ORDINARY = (Tensor, nn.Parameter)
Fact = tuple[Mapping[str, Any], str, Tensor, torch.dtype]


class Lane:
    """One adapter on the whole weight of one ordinary layer."""

    def __init__(self, holder: nn.Module, mount: Mount, name: str, adapter: Adapter) -> None:
        slot = bias_name(mount.attr)
        weight, bias = holder._parameters[mount.attr], holder._parameters.get(slot)
        assert weight is not None
        self.holder, self.mount, self.name, self.adapter = holder, mount, name, adapter
        self.weight, self.bias, self.slot = weight, bias, slot
        self.spaces = (holder.__dict__, adapter.__dict__)
        self.is_loose = name in mount.loose
        child: Any = holder._modules.get(mount.child)
        self.among: dict[str, Any] = mount.loose if self.is_loose else child._modules
        self.drawn = Drawn(Params({n: getattr(adapter, n) for n in adapter.names}, adapter.scale))
        self.facts = tuple(self._facts())
        # the engine that is known to reduce its gradients
        self.engine = DistributedDataParallel._active_ddp_module if torch.is_grad_enabled() else None
        self.varies = adapter.has_gate or adapter.draws_itself or bool(adapter.noise.rank_dropout)

    def _facts(self) -> Iterator[Fact]:
        """Where each tensor of the call is kept, and its number format."""
        adapter = self.adapter
        for name, t in self.drawn.params.tensors.items():
            yield adapter._parameters if name in adapter._parameters else adapter._buffers, name, t, t.dtype
        for name, own in ((self.mount.attr, self.weight), (self.slot, self.bias)):
            if own is not None:
                yield self.holder._parameters, name, own, own.dtype

    def is_open(self, x: Any) -> bool:
        """Whether all is as it was, and `x` an activation that meets weight and adapter where they are."""
        return type(x) in _ORDINARY and x.dtype.itemsize > 1 and self._is_alone() and self._is_here(x.device)

    def _is_alone(self) -> bool:
        """Whether this adapter, without chance on what it adds, is all that there is beside the weight."""
        mount, adapter = self.mount, self.adapter
        holder, own = self.spaces
        if (
            (mount.served is not None and not mount.served.is_idle())
            or mount.off
            or mount.merged
            or mount.in_group
            or len(self.among) != 1
            or self.among.get(self.name) is not adapter
            or own["strength"] == 0.0
            or own["scale"] != self.drawn.params.scale
            or not self._is_known_to_engine()
        ):
            return False
        if self.is_loose:
            if mount.child in holder["_modules"] or (adapter.belongs and own["training"] != holder["training"]):
                return False
        elif mount.loose:
            return False
        noise = own["noise"]
        return not (own["training"] and (noise.dropout or noise.module_dropout))

    def _is_known_to_engine(self) -> bool:
        engine = DistributedDataParallel._active_ddp_module
        return engine is None or engine is self.engine or not torch.is_grad_enabled()

    def _is_here(self, device: torch.device) -> bool:
        """Whether every tensor is the one that it was, on this device, and no engine has come since."""
        holder, own = self.spaces
        for key in _ENGINES:
            if key in holder or key in own:
                return False
        for space, name, t, dtype in self.facts:
            if space.get(name) is not t or t.dtype is not dtype or t.device != device:
                return False
        if self.bias is None and holder["_parameters"].get(self.slot) is not None:
            return False
        return not own["belongs"] or self.facts[0][2].data_ptr() == own["_seen_at"]

    def tensors(self, x: Tensor) -> Drawn:
        """The adapter's tensors for this call."""
        adapter, kept = self.adapter, self.mount.kept
        if self.varies and (adapter.training or adapter.context.ranks is not None):
            return adapter(x)
        if kept is None or torch.is_grad_enabled():
            return self.drawn
        memo = kept.at(t for _, _, t, _ in self.facts)
        return Drawn(self.drawn.params._replace(memo=memo))

    def read(self, x: Tensor) -> Weight:
        """The weight for this call."""
        return Weight.ordinary(self.holder, self.mount, x.device)


def lane_for(holder: nn.Module, mount: Mount, active: list[Adapter]) -> Lane | None:
    """The lane for a layer whose forward is that of its class; None where the long way must look each time."""
    site, weight = mount.site, holder._parameters.get(mount.attr)
    if len(active) != 1 or site.kind not in _KINDS or site.opaque or site.experts or mount.rows is not None:
        return None
    adapter = active[0]
    kept = [getattr(adapter, name) for name in adapter.names]
    base = [t for t in (weight, holder._parameters.get(bias_name(mount.attr))) if t is not None]
    is_ordinary = (
        all(type(t) in _ORDINARY and storage_of(holder, t) is None for t in base)
        and all(type(t) in _ORDINARY and t.dtype.itemsize >= 4 for t in kept)
        and not any(key in vars(thing) for thing in (holder, adapter, *base, *kept) for key in _ENGINES)
    )
    if not is_ordinary or adapter.pending or "scalar" in adapter.names or torch.compiler.is_compiling():
        return None
    names = [name for name, own in mount.loose.items() if own is adapter]
    child: Any = holder._modules.get(mount.child)
    names += [] if child is None else [name for name, own in child.items() if own is adapter]
    return Lane(holder, mount, names[0], adapter) if len(names) == 1 else None
