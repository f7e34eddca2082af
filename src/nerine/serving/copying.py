"""An adapter of a shelf copied into the fixed tensors of a network, for models that are compiled.

What `nerine.load(file, into network, swap=True)` does from a file is done here from memory: smaller ranks are filled
with zeros, layers that the adapter lacks come to rest, and no tensor, shape or number that a compiler has seen changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nerine.algorithms import Params
from nerine.errors import OptionError
from nerine.model.adapter import Adapter
from nerine.model.mount import weight_at
from nerine.model.network import Network
from nerine.model.sharded import at_rest, is_split, shape_of
from nerine.model.swap import check_can_rest, padded, rest
from nerine.serving.residence import Residence

__all__ = ["copy_params"]


@torch.no_grad()
def copy_params(residence: Residence, name: str, network: Network) -> None:
    """Give the adapters of `network` the values of the adapter `name`, and its strengths.

    Raises:
        OptionError: the network has several names, or no adapter at a layer that this one has.
        ShapeError: an adapter of the network has another algorithm, or a smaller rank.
        FormatError: an adapter of the network would have to rest, and cannot.
        MergeError: the network is merged.
    """
    if len(network.names) != 1:
        raise OptionError(f"copy_into: the network has several adapters; hand over one of {', '.join(network.names)}")
    network.not_merged("copy an adapter into it")
    at_rest(network.model)
    placed = {path: (holder, mount, adapter) for path, holder, mount, _, adapter in network.located()}
    held = residence.held[name]
    lost = [path for path in held.slots if path not in placed]
    if lost:
        raise OptionError(
            f"copy_into: {name!r} has adapters for {len(lost)} layers where the network has none, for example "
            f"{lost[0]}; attach it to all layers that the adapters of this shelf have"
        )
    found: list[tuple[Adapter, Params, float]] = []
    resting: list[Adapter] = []
    for path, (holder, mount, adapter) in placed.items():
        if path not in held.slots:
            check_can_rest(adapter, weight_at(holder, mount))
            resting.append(adapter)
            continue
        slot = held.slots[path]
        params = _fitted(adapter, residence.params(name, path, adapter.device))
        adapter.check_same(slot.algorithm, params)
        found.append((adapter, params, held.strength * slot.share))
    _copy(found)
    for adapter in resting:
        rest(adapter)


def _fitted(adapter: Adapter, params: Params) -> Params:
    """`params` in the shapes of `adapter`, and where it can be at its scale: a number that changes is compiled anew."""
    if {n: tuple(t.shape) for n, t in params.tensors.items()} != {
        n: shape_of(getattr(adapter, n)) for n in adapter.names if n != "scalar"
    }:
        params = padded(adapter, params)
    inner = getattr(adapter.algorithm, "inner", adapter.algorithm)
    plain = params.without("magnitude")
    ratio = params.scale / adapter.scale if adapter.scale else 1.0
    if ratio == 1 or not inner.is_fixed(plain) or inner.shift(plain) is not None:
        return params
    carried = {name: params.tensors[name] * ratio for name in adapter.carriers}
    return Params({**params.tensors, **carried}, adapter.scale)


def _copy(found: Sequence[tuple[Adapter, Params, float]]) -> None:
    """All tensors together, those of one device in one call."""
    pairs: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for adapter, params, strength in found:
        if adapter.strength != strength:
            adapter.strength = strength
        if adapter.pending or any(is_split(getattr(adapter, name)) for name in adapter.names):
            adapter.take(params)
            continue
        if adapter.scale != params.scale:
            adapter.scale = float(params.scale)
        own, new = pairs.setdefault(adapter.device, ([], []))
        for name in adapter.names:
            tensor = getattr(adapter, name)
            own.append(tensor)
            new.append(params.tensors[name] if name in params.tensors else torch.ones_like(tensor))  # a learned scalar
    for own, new in pairs.values():
        torch._foreach_copy_(own, new)
