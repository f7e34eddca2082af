"""How bases store their weights, and how each kind is read and written: one table.

A weight may be packed to four bits, scaled to eight, cut into shards, or just be kept in a format that does not
compute. Whatever needs its values (DoRA's norms, a merge, an initialisation) asks here and gets an ordinary tensor.
No package is imported for that: a kind is recognised by the names of its classes. A new kind is one entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nerine.model.sharded import is_partitioned, is_split, whole, whole_at_rest, written

__all__ = ["Storage", "is_named", "shape_at", "storage_of"]

Read = Callable[[nn.Module, Tensor], Tensor]
Write = Callable[[nn.Module, Tensor, Tensor], nn.Parameter]


@dataclass(frozen=True)
class Storage:
    """One way to store a weight.

    `read(module, stored)` gives its values in the module's own form (`[out, in]` for a Linear) in a format that
    computes, on the device of the stored tensor. `write(module, stored, weight)` gives a new parameter that stores
    other values in the same way, rounded to it; the old one stays as it is, so that it can be put back. Where `write`
    is None, `refusal` says why such a weight cannot be merged into.
    """

    name: str
    is_it: Callable[[nn.Module, Tensor], bool]
    read: Read
    write: Write | None = None
    refusal: str = ""
    in_place: bool = False  # `write` changes the parameter itself, of which a copy is kept to put back


def is_named(thing: object, *names: str) -> bool:
    """Whether the class of `thing`, or one that it inherits from, has one of these names."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)


# -- eight-bit floats without a scale ---------------------------------------------------------------------------------
def _rounded(module: nn.Module, stored: Tensor, weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.to(stored.device, stored.dtype), requires_grad=False)


_FLOAT8 = Storage(
    "float8",
    lambda module, stored: (
        type(stored) in (Tensor, nn.Parameter) and stored.is_floating_point() and stored.dtype.itemsize == 1
    ),
    lambda module, stored: stored.to(torch.float32),
    _rounded,
)

# -- split over processes ---------------------------------------------------------------------------------------------
_SPLIT = Storage(
    "split", lambda module, stored: is_split(stored), lambda module, stored: whole(stored), written, in_place=True
)
_PARTITIONED = Storage(
    "partitioned",
    lambda module, stored: is_partitioned(stored),
    lambda module, stored: whole_at_rest(stored),
    refusal="under ZeRO-3 the engine keeps the weight in pieces of its own: save(network, file), and merge the file "
    "into a model that is not partitioned",
)

_STORAGES: tuple[Storage, ...] = (_FLOAT8, _SPLIT, _PARTITIONED)


def storage_of(module: nn.Module, stored: Any) -> Storage | None:
    """The entry for a stored weight of `module`; None for an ordinary tensor in a format that computes."""
    if type(stored) is nn.Parameter and stored.dtype.itemsize > 1 and stored.is_floating_point():
        return _PARTITIONED if is_partitioned(stored) else None
    if not isinstance(stored, Tensor):
        return None
    return next((storage for storage in _STORAGES if storage.is_it(module, stored)), None)


def shape_at(module: nn.Module, attr: str = "weight") -> tuple[int, ...]:
    """The shape that the stored weight stands for, in the module's own form."""
    stored = module._parameters[attr]
    assert stored is not None
    if attr == "weight" and isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    return tuple(getattr(stored, "ds_shape", stored.shape))
