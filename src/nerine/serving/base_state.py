"""The state of a layer's own weight, and values that hold for as long as it stays the same.

Norms of W' depend on the adapter and on the weight. Both mostly stand still while a model is served; but a merge, an
optimiser or an engine that moves weights may change the second, and then what was remembered must not be used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nerine.model.mount import Mount
from nerine.model.offload import is_offloaded

__all__ = ["Memory", "State", "outside_autograd", "state_of"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class State:
    """Which parameter a layer has, in which memory, and how often that was written to."""

    of: weakref.ref[Tensor]  # the same object for as long as anybody holds it
    version: int
    place: int

    def same(self, other: State | None) -> bool:
        """Whether the weight is what it was then."""
        return other is not None and (self.of, self.version, self.place) == (other.of, other.version, other.place)


def state_of(holder: nn.Module, mount: Mount) -> State | None:
    """The state of the weight under a mount; None where it cannot be told, or is being trained.

    An engine that brings a weight for each call leaves no sign of whether it is the same one.
    """
    own: Any = holder._parameters.get(mount.attr)
    if own is None or own.is_meta or own.is_inference() or mount.in_group or is_offloaded(holder):
        return None
    if own.requires_grad and torch.is_grad_enabled():
        return None
    place = 0 if is_traceable_wrapper_subclass(own) else own.data_ptr()
    return State(weakref.ref(own), own._version, place)


def outside_autograd(make: Callable[[], T]) -> T:
    """What `make` gives, as plain tensors: neither with a history, nor such as inference mode makes, which autograd
    could not use later."""
    with torch.inference_mode(False), torch.no_grad():
        return make()


class Memory(Generic[T]):
    """One value that was worked out beside the weight of a layer."""

    def __init__(self) -> None:
        self._state: State | None = None
        self._value: T | None = None

    def get(self, state: State | None, make: Callable[[], T]) -> T:
        """The value for that state of the weight, made where there is none."""
        if state is None:
            return make()
        if self._value is None or not state.same(self._state):
            self._value = outside_autograd(make)
            self._state = state
        return self._value
