"""How bases store their weights, and how each kind is read and written: one table.

A weight may be packed to four bits, scaled to eight, cut into shards, or just be kept in a format that does not
compute. Whatever needs its values (DoRA's norms, a merge, an initialisation) asks here and gets an ordinary tensor. A
kind is recognised by the names of its classes, and the package that it belongs to is imported only once such a weight
is at hand. A new kind is one entry; one file holds those of one package.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nerine.model.sharded import is_partitioned
from nerine.model.storage import bitsandbytes, float8, gguf, quanto, split, torchao
from nerine.model.storage.kind import Storage, is_named

__all__ = ["Storage", "is_named", "shape_at", "storage_of"]

_STORAGES: tuple[Storage, ...] = (
    float8.SCALED,
    float8.PLAIN,
    bitsandbytes.FOUR_BITS,
    bitsandbytes.EIGHT_BITS,
    torchao.WRITABLE,
    torchao.PACKED,
    quanto.QUANTO,
    gguf.GGUF,
    split.SPLIT,
)


def storage_of(module: nn.Module, stored: Any) -> Storage | None:
    """The entry for a stored weight of `module`; None for an ordinary tensor in a format that computes."""
    if not isinstance(stored, Tensor):
        return None
    is_ordinary = type(stored) in (Tensor, nn.Parameter) and stored.dtype.itemsize > 1 and stored.is_floating_point()
    if is_ordinary and is_partitioned(stored):
        return split.PARTITIONED
    if is_ordinary and not quanto.rounds_when_called(module):
        return None
    return next((storage for storage in _STORAGES if storage.is_it(module, stored)), None)


def shape_at(module: nn.Module, attr: str = "weight") -> tuple[int, ...]:
    """The shape that the stored weight stands for, in the module's own form."""
    stored = module._parameters[attr]
    assert stored is not None
    if attr == "weight" and isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    return tuple(getattr(stored, "ds_shape", stored.shape))
