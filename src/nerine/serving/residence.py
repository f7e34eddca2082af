"""Where adapters are: all of them in memory, the few that were used last on the device as well.

An adapter is one flat tensor for each number format and device that its layers have, so that it comes to a device in
one copy; the tensors of a layer are views of it, made when the layer first asks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nerine.algorithms import Algorithm, Params
from nerine.axes import Shape
from nerine.errors import DeviceError, OptionError
from nerine.model.fitting import Fitting
from nerine.model.offload import computes_on
from nerine.serving.base_state import outside_autograd
from nerine.serving.pieces import Piece
from nerine.site import Site

__all__ = ["Held", "Residence", "Slot", "held_of"]

_ALIGNED = 16  # values: tensors begin at whole cache lines


class Slot(NamedTuple):
    """An adapter at one layer, without its values: each tensor's name, shape and place in the flat tensor `home`."""

    algorithm: Algorithm
    site: Site
    scale: float
    share: float  # strength by pattern
    home: int
    tensors: tuple[tuple[str, Shape, int], ...]


class _Home(NamedTuple):
    """One flat tensor in memory, the format in which it computes, and a module that has one of its layers."""

    flat: Tensor
    working: torch.dtype
    holder: nn.Module

    @property
    def device(self) -> torch.device | None:
        """Where its layers compute; None where that is not known before they are called."""
        found = computes_on(self.holder)
        if found is None:
            found = next(p.device for p in self.holder._parameters.values() if p is not None)
        return None if found.type == "meta" else found


@dataclass(eq=False)
class Held:
    """One adapter: what it is at each layer, its values in memory, and what of it is on devices now."""

    name: str
    source: str
    strength: float
    slots: Mapping[str, Slot]
    homes: tuple[_Home, ...]
    there: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)
    pieces: dict[tuple[str, torch.device], Piece] = field(default_factory=dict)

    @property
    def values(self) -> int:
        return sum(torch.Size(shape).numel() for slot in self.slots.values() for _, shape, _ in slot.tensors)

    @property
    def bytes(self) -> int:
        return sum(home.flat.nbytes for home in self.homes)

    def go(self, index: int, device: torch.device) -> Tensor:
        """The flat tensor on `device`, in the format in which it computes."""
        if (index, device) not in self.there:
            flat, working, _ = self.homes[index]
            moved = outside_autograd(lambda: flat.to(device, non_blocking=flat.is_pinned()).to(working))
            self.there[index, device] = moved
        return self.there[index, device]

    def params(self, path: str, device: torch.device) -> Params:
        """The tensors of one layer, views of the flat one."""
        slot = self.slots[path]
        flat = self.go(slot.home, device)
        sizes = ((name, shape, at, torch.Size(shape).numel()) for name, shape, at in slot.tensors)
        return Params({name: flat[at : at + n].view(shape) for name, shape, at, n in sizes}, slot.scale)

    def leave(self) -> None:
        """Give up what is on devices."""
        self.there.clear()
        self.pieces.clear()


@dataclass
class _Filling:
    """A flat tensor about to be made: where each tensor begins, and how long it is so far."""

    holder: nn.Module
    tensors: list[tuple[Tensor, int]] = field(default_factory=list)
    size: int = 0

    def put(self, t: Tensor) -> int:
        at = self.size
        self.tensors.append((t, at))
        self.size += -(-t.numel() // _ALIGNED) * _ALIGNED
        return at

    def flat(self, dtype: torch.dtype, pin: bool) -> Tensor:
        """All of them in memory; put together where they are, so that they come from a device in one copy."""
        there = torch.zeros(self.size, dtype=dtype, device=self.tensors[0][0].device)
        for t, at in self.tensors:
            there[at : at + t.numel()].copy_(t.reshape(-1))
        return torch.empty(self.size, dtype=dtype, pin_memory=pin).copy_(there)


def held_of(
    name: str, source: str, strength: float, fittings: Sequence[Fitting], dtype: torch.dtype | None, pin: bool
) -> Held:
    """The adapter of a file in memory, its values in `dtype` (None: that in which it computes)."""
    fillings: dict[tuple[torch.dtype, torch.device], _Filling] = {}
    slots: dict[str, Slot] = {}
    for spot, algorithm, params, share in ((f.spot, f.algorithm, f.params, f.strength) for f in fittings):
        first = next(iter(params.tensors.values()))  # all of them are as the weight asks for
        key = (first.dtype, first.device)
        filling = fillings.setdefault(key, _Filling(spot.holder))
        tensors = tuple((n, tuple(t.shape), filling.put(t)) for n, t in params.tensors.items())
        slots[spot.path] = Slot(algorithm, spot.site, params.scale, share, list(fillings).index(key), tensors)
    homes = outside_autograd(
        lambda: tuple(
            _Home(filling.flat(dtype or working, pin), working, filling.holder)
            for (working, _), filling in fillings.items()
        )
    )
    return Held(name, source, strength, slots, homes)


class Residence:
    """All adapters by name, at most `limit` of them on devices: whoever was not used for longest leaves first."""

    def __init__(self, limit: int, device: torch.device | None) -> None:
        self.limit = limit
        self.device = device
        self.held: dict[str, Held] = {}
        self.resident: OrderedDict[str, Held] = OrderedDict()
        self._lock = threading.RLock()

    def add(self, held: Held) -> None:
        """Take it in; layers of another adapter that are described alike share one description."""
        for other in list(self.held.values())[-4:]:
            if other.slots == held.slots:
                held.slots = other.slots
        self.held[held.name] = held

    def remove(self, name: str) -> Held:
        with self._lock:
            self.resident.pop(name, None)
            held = self.held.pop(name)
            held.leave()
            return held

    def check_room(self, names: Sequence[str]) -> None:
        """Raise `OptionError` where so many cannot be on the device together."""
        if len(names) > self.limit:
            raise OptionError(
                f"{len(names)} different adapters at once, and at most {self.limit} are kept on the device: make the "
                f"shelf with resident={len(names)} or more, or split the batch so that each part names fewer"
            )

    def bring(self, names: Iterable[str]) -> None:
        """Bring adapters to where their layers compute, and send away those that were not used for longest."""
        with self._lock:
            wanted = tuple(names)
            new = [name for name in wanted if name not in self.resident]
            for name in wanted:
                self.resident[name] = self.held[name]
                self.resident.move_to_end(name)
            while len(self.resident) > self.limit:
                _, old = self.resident.popitem(last=False)
                old.leave()
            for held in (self.held[name] for name in new):
                for index, home in enumerate(held.homes):
                    device = self.device or home.device
                    if device is not None:
                        held.go(index, device)

    def piece(self, name: str, path: str, device: torch.device) -> Piece:
        """An adapter at a layer that computes on `device`.

        Raises:
            DeviceError: the shelf was told to keep adapters on another.
        """
        held = self.held[name]
        found = held.pieces.get((path, device))
        if found is not None:
            return found
        if self.device is not None and self.device != device:
            raise DeviceError(
                f"{path}: its input is on {device}, and the shelf keeps adapters on {self.device}: move the model "
                "there, or make the shelf with device=None, so that adapters go where their layers compute"
            )
        with self._lock:
            if name not in self.resident:
                self.bring([name])
            slot = held.slots[path]
            piece = held.pieces[path, device] = Piece(slot.algorithm, held.params(path, device), slot.site)
            return piece

    def params(self, name: str, path: str, device: torch.device) -> Params:
        """The tensors of an adapter at a layer, on `device`."""
        with self._lock:
            if name not in self.resident:
                self.bring([name])
            return self.held[name].params(path, device)
