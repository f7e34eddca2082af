"""Tensors of which every process holds a piece: DTensor (FSDP2, tensor parallel) and the parameters of ZeRO-3.

What the whole of such a tensor is, how other values are put into it, and which engines must come after the adapters
and not before. Whatever reads a whole tensor here is a collective: all processes must call it alike. None of the
packages is imported before one of its tensors is met.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nerine.errors import OptionError

__all__ = [
    "at_rest",
    "check_engines",
    "check_known_to_engine",
    "copy_into",
    "drawn_alike",
    "is_partitioned",
    "is_split",
    "like",
    "made_alike",
    "only_first",
    "shape_of",
    "whole",
    "whole_at_rest",
    "written",
]

_log = logging.getLogger("nerine")


def is_split(t: object) -> bool:
    """Whether a tensor is a DTensor, split over a mesh of processes."""
    return type(t).__name__ == "DTensor"


def is_partitioned(t: object) -> bool:
    """Whether a parameter belongs to ZeRO-3 and is empty now: every process keeps a piece of it elsewhere."""
    status = getattr(t, "ds_status", None)
    return status is not None and status.name != "AVAILABLE"


def shape_of(t: Tensor) -> tuple[int, ...]:
    """The shape of the whole."""
    return tuple(getattr(t, "ds_shape", t.shape))


def whole(t: Tensor) -> Tensor:
    """All of a tensor, the same in every process; an ordinary one as it is.

    Raises:
        OptionError: a parameter of ZeRO-3 where gradients are wanted, which do not flow through its gathering.
    """
    if is_split(t):
        found: Tensor = t.full_tensor()  # type: ignore[attr-defined]
        return found
    if not is_partitioned(t):
        return t
    if t.requires_grad and torch.is_grad_enabled():
        raise OptionError(
            "under ZeRO-3 the tensors of an adapter have values for gradients only within the model's forward: "
            "compute there, or under torch.no_grad()"
        )
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([t]):
        return t.detach().clone()


def whole_at_rest(t: Tensor) -> Tensor:
    """The same for a weight of ZeRO-3 outside of its module's forward, where no gradient can flow to it."""
    with torch.no_grad():
        return whole(t)


@torch.no_grad()
def copy_into(own: Tensor, value: Tensor) -> None:
    """Copy values, whole or split in the same way, into a tensor; of a split one each process takes its piece."""
    if is_partitioned(own):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([own], modifier_rank=0):
            own.copy_(value)
    elif is_split(own) and not is_split(value):
        own.copy_(_split(value.to(own.device, own.dtype), own))
    else:
        own.copy_(value)


def _split(value: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def written(module: nn.Module, stored: Tensor, weight: Tensor) -> nn.Parameter:
    """The parameter of a split weight with other values: the same one, for its engine knows it by identity."""
    copy_into(stored, weight)
    assert isinstance(stored, nn.Parameter)
    return stored


def like(value: Tensor, other: Any) -> Tensor:
    """A tensor that is whole in every process, as one on the mesh of `other` where that is split."""
    if not is_split(other):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


# -- the same in every process ------------------------------------------------------------------------------------
def _tell(mesh: Any, t: Tensor) -> None:
    """Give every process of a mesh the values that the first one has."""
    for dim in range(mesh.ndim):
        group = mesh.get_group(dim)
        torch.distributed.broadcast(t, torch.distributed.get_global_rank(group, 0), group=group)


def made_alike(stored: Any, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Fresh tensors of an adapter; on a weight that is split over processes they are those of the first of these."""
    made = [t.contiguous() for t in tensors]
    if is_split(stored) and not stored.is_meta:
        for t in made:
            _tell(stored.device_mesh, t)
    return made


@contextmanager
def drawn_alike(stored: Any, draws: bool) -> Iterator[None]:
    """Within it all processes that share a split weight draw the same random numbers, from a seed of the first."""
    if not draws or not is_split(stored):
        yield
        return
    device = stored.device
    seed = torch.randint(2**60, (1,), device=device)
    _tell(stored.device_mesh, seed)
    others = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**{"devices": [], **others}):
        torch.manual_seed(int(seed))
        yield


def only_first(tensors: Iterable[Tensor], act: Callable[[], int]) -> int:
    """What `act` gives, done by one process for all of those that hold pieces of `tensors`; what it raises, all raise.

    Without such tensors it is simply done.
    """
    mesh, ranks = None, None
    for t in tensors:
        if is_split(t) and (mesh is None or t.device_mesh.ndim > mesh.ndim):  # type: ignore[attr-defined]
            mesh = t.device_mesh  # type: ignore[attr-defined]
        elif hasattr(t, "ds_id"):
            ranks = t.ds_process_group  # type: ignore[attr-defined]
    groups = [mesh.get_group(dim) for dim in range(mesh.ndim)] if mesh is not None else [ranks] if ranks else []
    if not groups:
        return act()
    told: list[Any] = [None]
    if all(torch.distributed.get_rank(group) == 0 for group in groups):
        try:
            told = [act()]
        except Exception as error:
            told = [error]
    for group in groups:
        torch.distributed.broadcast_object_list(told, torch.distributed.get_global_rank(group, 0), group=group)
    if isinstance(told[0], Exception):
        raise told[0]
    return int(told[0])


# -- engines ------------------------------------------------------------------------------------------------------
def _is_named(module: object, *names: str) -> bool:
    return any(kind.__name__ in names for kind in type(module).__mro__)


def at_rest(model: nn.Module) -> None:
    """Let FSDP2 take back what it has left whole after a forward, so that changes reach the pieces."""
    for module in model.modules():
        if _is_named(module, "FSDPModule"):
            module.reshard()  # type: ignore[operator]


def check_engines(model: nn.Module, layers: Iterable[tuple[str, nn.Module]] = ()) -> None:
    """Whether adapters can still be put on `layers` (path, module) of `model`.

    Raises:
        OptionError: an engine has taken over the parameters already, and would neither split nor reduce new ones.
    """
    known: dict[int, str] = {}
    for module in model.modules():
        wrapper = next((name for name in _WRAPPERS if _is_named(module, name)), None)
        if wrapper is not None:
            raise OptionError(
                f"{type(module).__name__} has collected its parameters already and would not reduce the gradients of "
                f"new ones: attach to the model within it, before {_WRAPPERS[wrapper]}"
            )
        if _is_named(module, "FSDPModule"):
            known.update((id(part), "fully_shard(...)") for part in module.modules())
        if "ds_id" in module.__dict__:
            known[id(module)] = "deepspeed.initialize(...)"
    for path, layer in layers:
        call = known.get(id(layer))
        if call is None and is_split(layer._parameters.get("weight")) and not _is_parallelised(layer):
            call = "fully_shard(...)"
        if call is not None:
            raise OptionError(
                f"{path}: {call} has taken over this layer already and would neither split nor reduce the tensors of "
                f"new adapters: call attach(...) or load(...) first, then {call}"
            )


_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel(model)",
    "FullyShardedDataParallel": "FullyShardedDataParallel(model)",
    "DeepSpeedEngine": "deepspeed.initialize(...)",
}


def _is_parallelised(module: nn.Module) -> bool:
    """Whether `parallelize_module` has prepared the inputs and outputs of a layer."""
    return bool(getattr(module, "_distribute_module_applied", False))


def check_known_to_engine(path: str, parameters: Iterable[nn.Parameter], is_own: bool) -> None:
    """Whether the DistributedDataParallel whose forward is running knows the parameters of an adapter.

    Raises:
        OptionError: it does not, so that each process would train the adapter for itself. Where a host keeps the
            adapters (`own=False`) it may reduce them by itself; that is logged.
    """
    engine = torch.nn.parallel.DistributedDataParallel._active_ddp_module
    if engine is None or not torch.is_grad_enabled():
        return
    known = engine.__dict__.get("_nerine_known")
    if known is None:
        known = engine.__dict__["_nerine_known"] = {id(p) for p in engine._module_parameters}
    if all(id(p) in known or not p.requires_grad for p in parameters):
        return
    if is_own:
        raise OptionError(
            f"{path}: DistributedDataParallel does not know this adapter, so every process would train it for itself: "
            "attach(model, ...) first, then DistributedDataParallel(model)"
        )
    if not engine.__dict__.setdefault("_nerine_told", False):
        engine.__dict__["_nerine_told"] = True
        _log.warning(
            "%s: with own=False DistributedDataParallel does not know the adapters; after every backward average their "
            "gradients yourself, as in `for p in network.parameters(): torch.distributed.all_reduce(p.grad)`",
            path,
        )
