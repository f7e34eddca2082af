"""What a user may hand over for a model: a module, or a whole pipeline whose parts are then one model.

Also how a model is walked: the wrappers that PEFT and `torch.compile` put around modules leave no trace in the paths of
layers, so that a file fits with and without them. Nothing of these packages is imported; pipelines are known by their
`components`, wrappers by the attributes that they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from nerine.errors import OptionError
from nerine.parts import PARTS

__all__ = ["HasComponents", "Parts", "as_model", "named_layers", "part_of", "unwrapped"]


class HasComponents(Protocol):
    """A pipeline, such as diffusers has: an object that tells its parts by name."""

    @property
    def components(self) -> Mapping[str, Any]: ...


class Parts(nn.ModuleDict):
    """The parts of a pipeline that take adapters, as one model: layers are called "unet.down_blocks...".

    It only refers to them; the pipeline, its modules and their hooks know nothing of it.
    """


def as_model(host: nn.Module | HasComponents, doing: str, others: str = "") -> nn.Module:
    """`host` itself if it is a module; the denoisers and text encoders of a pipeline as one.

    Raises:
        OptionError: it is neither, or a pipeline without such parts.
    """
    if isinstance(host, nn.Module):
        return host
    components = getattr(host, "components", None)
    if not isinstance(components, Mapping):
        raise OptionError(
            f"{doing}: expected a torch.nn.Module{others} or a pipeline (with `components`), got {type(host).__name__}"
        )
    found = {name: part for name, part in components.items() if name in PARTS and isinstance(part, nn.Module)}
    if not found:
        raise OptionError(
            f"{doing}: {type(host).__name__} has none of the parts that take adapters ({', '.join(PARTS)}), only "
            f"{', '.join(components) or 'nothing'}; hand over the module itself, as in pipe.controlnet"
        )
    return Parts(found)


def part_of(model: nn.Module, path: str) -> nn.Module:
    """The module of its own that the layer at `path` is in: a part of a pipeline, else the model.

    A view of a pipeline is gone with the network that it was made for; its parts are not.
    """
    part = model._modules.get(path.split(".", 1)[0]) if isinstance(model, Parts) else None
    return model if part is None else part


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` without wrappers: what they are around bears their name, and their own parts are left
    out. Where PEFT trains a copy of a module, the copy in use stands for it."""
    yield from _named(model, "", set())


def unwrapped(module: nn.Module) -> nn.Module | None:
    """What wrappers are around, the module itself if it is none, None where their forward calls no layer within."""
    found = _within(module)
    while found is not module:
        if found is None:
            return None
        module, found = found, _within(found)
    return module


def _named(wrapped: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(wrapped)
    if module is None or id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _named(child, f"{path}.{name}" if path else name, seen)


def _within(module: nn.Module) -> nn.Module | None:
    """What a wrapper is around, the module itself if it is none, None where its forward calls no layer within."""
    parts, own = module._modules, module.__dict__
    if "_orig_mod" in parts:  # torch.compile
        return parts["_orig_mod"]
    if "base_layer" in parts and hasattr(type(module), "adapter_layer_names"):  # a layer of PEFT's
        return parts["base_layer"]
    if "token_adapter" in parts:  # single tokens, in a forward of its own
        return None
    if "modules_to_save" in parts and "original_module" in parts:
        return _copy_in_use(module)
    if "targeted_module_names" in own and "model" in parts:  # a tuner of PEFT's
        return parts["model"]
    if "_is_prompt_learning" in own and "base_model" in parts:  # its model
        return parts["base_model"]
    return module


def _copy_in_use(wrapper: Any) -> nn.Module:
    """The module that PEFT's wrapper around a fully trained module calls."""
    active = wrapper.active_adapters[:1]
    copies = wrapper.modules_to_save
    trained = bool(active) and active[0] in copies and not wrapper.disable_adapters
    found: nn.Module = copies[active[0]] if trained else wrapper.original_module
    return found
