"""What a module with adapters carries: mounts, one for each adapted weight, and how to reach what is under them.

The module that holds the weight has its mounts in one instance attribute, and the adapters that it owns in a child
module `nerine`. This file only looks and writes values; `attach` puts on and takes off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nerine.model.adapter import Adapter
from nerine.model.layer import bias_name
from nerine.ops.precision import same_dtype
from nerine.site import Site

__all__ = [
    "MOUNTS",
    "USES",
    "Mount",
    "Spot",
    "Use",
    "adapters_of",
    "bias_at",
    "dtype_at",
    "mounts_of",
    "owned",
    "weight_at",
    "write",
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
    return list(module.__dict__.get(MOUNTS, {}).values())


def owned(holder: nn.Module, mount: Mount) -> nn.ModuleDict:
    """The child that holds the adapters which the layer owns."""
    owned: nn.ModuleDict = getattr(holder, mount.child)
    return owned


def adapters_of(holder: nn.Module, mount: Mount) -> Iterator[tuple[str, Adapter]]:
    """The named adapters of a mount, in the order in which they were put on (those a host owns last)."""
    if mount.child in holder._modules:
        yield from owned(holder, mount).items()  # type: ignore[misc]
    if mount.loose:
        yield from mount.loose.items()


# -- the weight under a mount ------------------------------------------------------------------------------------
def weight_at(holder: nn.Module, mount: Mount | Spot) -> Tensor:
    """The weight `[out, in/groups, *k]` under a mount; a view of the module's own where there is one."""
    weight = mount.site.canonical(holder._parameters[mount.attr])  # type: ignore[arg-type]
    return weight if mount.rows is None else weight[mount.rows[0] : mount.rows[1]]


def dtype_at(holder: nn.Module, mount: Mount) -> torch.dtype:
    """The number format of that weight, without making anything of it."""
    dtype: torch.dtype = holder._parameters[mount.attr].dtype  # type: ignore[union-attr]
    return dtype


def bias_at(holder: nn.Module, mount: Mount) -> Tensor | None:
    """The bias that belongs to it, or None."""
    bias = holder._parameters.get(bias_name(mount.attr))
    return bias if bias is None or mount.rows is None else bias[mount.rows[0] : mount.rows[1]]


@torch.no_grad()
def write(holder: nn.Module, mount: Mount, weight: Tensor, bias: Tensor | None) -> None:
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
