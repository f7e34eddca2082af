"""Engines that move weights between calls: accelerate's and diffusers' hooks.

Where the values of a weight are while its module rests, on which device it computes, and where in such a module our
forward goes: inside the hooks, where the weight is present. Nothing of either package is imported; their hooks are
known by the attributes that they leave on modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Groups",
    "Slot",
    "computes_on",
    "forward_slots",
    "innermost",
    "is_offloaded",
    "offloaded",
    "present",
    "put_offloaded",
    "unhook",
]

Slot = tuple[dict[str, Any], str]  # a namespace and the name in it that holds a forward


def _accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on one module."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _group_of(module: nn.Module) -> Any:
    """The group in which diffusers moves the parameters of a module with a hook; None without."""
    registry = module.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.hooks.get("group_offloading")
    return None if hook is None else hook.group


# -- where our forward goes ---------------------------------------------------------------------------------------
def forward_slots(module: nn.Module) -> list[Slot]:
    """Every place that may hold a forward of `module`: the instance's own, and those under its hooks."""
    slots: list[Slot] = [(module.__dict__, "forward")]
    if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
        slots.append((module.__dict__, "_old_forward"))
    registry = module.__dict__.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        replaced = getattr(reference, "original_forward", None) is not None
        slots.append((reference.__dict__, "original_forward" if replaced else "forward"))
    return slots


def innermost(module: nn.Module) -> tuple[Slot, Callable[..., Any] | None]:
    """The place of the forward that the hooks are around, and what it holds; None where that is the class's own."""
    for slot in forward_slots(module):
        held = slot[0].get(slot[1])
        hooked = getattr(getattr(held, "func", None), "__module__", "").split(".")[0] in ("accelerate", "diffusers")
        if not hooked:
            return slot, None if getattr(held, "__func__", None) is type(module).forward else held
    raise AssertionError("a chain of hooks with no forward in it")


# -- where the weights are ----------------------------------------------------------------------------------------
def _map_of(module: nn.Module) -> Any:
    """accelerate's map from names to the values of offloaded tensors; None where nothing is offloaded."""
    hooks = (hook for hook in _accelerate_hooks(module) if getattr(hook, "offload", False))
    return next((hook.weights_map for hook in hooks if hook.weights_map is not None), None)


def offloaded(module: nn.Module, attr: str) -> Tensor | None:
    """The value of a parameter that is on `meta` while its module rests; None where no hook holds one."""
    held = _map_of(module)
    value: Tensor | None = None if held is None else held[attr]
    return value


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate takes the parameters of `module` away after each call."""
    return "_hf_hook" in module.__dict__ and _map_of(module) is not None


def put_offloaded(module: nn.Module, attr: str, value: Tensor) -> None:
    """Change the value that a hook holds: in place in memory; for a tensor on disk in memory from now on."""
    held, key = _map_of(module), attr
    while hasattr(held, "dataset"):  # a map that adds a prefix to the names of another
        held, key = held.dataset, f"{held.prefix}{key}"
    in_memory = getattr(held, "state_dict", held)
    if key in in_memory:
        in_memory[key].copy_(value)
    else:
        in_memory[key] = value.detach().to("cpu", held[key].dtype, copy=True)


def computes_on(module: nn.Module) -> torch.device | None:
    """The device to which a hook brings the weights of `module` for a call; None without such a hook."""
    for hook in _accelerate_hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    group = _group_of(module)
    return None if group is None else torch.device(group.onload_device)


class Groups:
    """The groups in which diffusers moves the parameters of a model, each known by the parameters in it."""

    def __init__(self, model: nn.Module) -> None:
        self.groups = list({id(g): g for g in map(_group_of, model.modules()) if g is not None}.values())
        self.by_parameter: dict[int, Any] = {}
        for group in self.groups:
            inside = [*group.parameters, *(p for module in group.modules for p in module.parameters())]
            self.by_parameter.update({id(p): group for p in inside})

    def device_of(self, parameter: Tensor | None) -> torch.device | None:
        """Where the parameter computes; None where no group moves it."""
        group = self.by_parameter.get(id(parameter))
        return None if group is None else torch.device(group.onload_device)

    def in_memory(self, parameter: Tensor | None) -> bool:
        """Whether a group takes the parameter away after each call, and keeps it in memory."""
        group = self.by_parameter.get(id(parameter))
        return group is not None and group.offload_to_disk_path is None

    def let_go(self, tensors: Sequence[Tensor]) -> None:
        """Take tensors, with their values, out of the group that moves the first of them.

        They must be no parameters of its modules any more.
        """
        group = self.by_parameter[id(tensors[0])]
        if group.offload_to_disk_path is not None:
            group.onload_()
            for t in tensors:
                group.key_to_tensor.pop(group.tensor_to_key.pop(t, None), None)
        mine = {id(t) for t in tensors}
        group.parameters = [t for t in group.parameters if id(t) not in mine]
        group.buffers = [t for t in group.buffers if id(t) not in mine]

    def on_disk(self) -> list[Any]:
        """The groups whose values are in files, so that their tensors hold nothing while they rest."""
        return [g for g in self.groups if g.offload_to_disk_path is not None and g._is_offloaded_to_disk]


@contextmanager
def present(model: nn.Module) -> Iterator[None]:
    """With every weight that diffusers keeps in files in memory, for reading."""
    groups = Groups(model).on_disk()
    for group in groups:
        group.onload_()
    try:
        yield
    finally:
        for group in groups:
            group.offload_()


def unhook(module: nn.Module) -> dict[str, Tensor]:
    """Take every hook off `module` alone; returns the values that one held of tensors that it had emptied."""
    group = _group_of(module)
    if group is not None:  # made for the tensors of this module alone
        group.onload_()
        group.parameters, group.buffers = [], []
        if group.offload_to_disk_path is not None:
            group.tensor_to_key, group.key_to_tensor = {}, {}
    held = _map_of(module)
    names = [name for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and t.is_meta]
    values = {} if held is None else {name: held[name] for name in names}
    for key in (
        "_hf_hook",
        "_diffusers_hook",
        "_old_forward",
        "forward",
        "to",
        "cuda",
        "npu",
        "xpu",
        "mlu",
        "sdaa",
        "musa",
    ):
        module.__dict__.pop(key, None)
    return values
