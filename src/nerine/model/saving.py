"""`save_pretrained` of an adapted model: plain weights under plain keys, or an error, but no file that is neither.

transformers and diffusers write whatever `state_dict` has, and adapters are children of their layers: the file would
hold the base, and beside it tensors that no program reads. So a model with adapters gets a `save_pretrained` of its
own, on the instance alone, and loses it with its last adapter. A merged model saves as the plain model it computes.
Whoever hands over a `state_dict` argument, as transformers' Trainer does for its checkpoints, is left alone: these hold
all tensors, and a training resumes from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nerine.errors import MergeError
from nerine.model.mount import adapters_of, mounts_of, owned
from nerine.model.pipeline import named_layers

__all__ = ["Saving", "free_saving", "guard_saving"]

_NAME = "save_pretrained"


class Saving:
    """What stands in for the method `save_pretrained` of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        """Pipelines look at it to see which arguments a part takes."""
        return inspect.signature(self._own())

    def _own(self) -> Any:
        return getattr(type(self.model), _NAME).__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active = {
            name
            for holder in self.model.modules()
            for mount in mounts_of(holder)
            for name, adapter in adapters_of(holder, mount)
            if adapter.belongs and adapter.strength and name not in mount.merged and name not in mount.off
        }
        if active and "state_dict" not in kwargs:
            raise MergeError(
                f"{type(self.model).__name__}.save_pretrained: it has adapters that are not in its weights "
                f"({', '.join(sorted(active))}), and its own file format has no place for them. nerine.save(network, "
                "file) writes the adapters; network.merge() puts them into the weights, which are then saved plain; "
                "network.off() leaves them out"
            )
        if active or kwargs.get("state_dict") is not None:
            return self._own()(*args, **kwargs)
        with _without_adapters(self.model):
            return self._own()(*args, **kwargs)


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """With no adapters among the children of layers, so that a state dict has none."""
    taken = []
    for holder in list(model.modules()):
        for mount in mounts_of(holder):
            if mount.child in holder._modules:
                taken.append((holder, mount.child, owned(holder, mount)))
                del holder._modules[mount.child]
    try:
        yield
    finally:
        for holder, name, child in taken:
            holder._modules[name] = child


def _is_adapted(model: nn.Module) -> bool:
    """Whether layers own adapters below a module; those of a host are the host's to save."""
    adapters = (a for module in model.modules() for mount in mounts_of(module) for _, a in adapters_of(module, mount))
    return any(adapter.belongs for adapter in adapters)


def guard_saving(model: nn.Module) -> None:
    """Put it on every module that has adapters below it and can save itself."""
    for _, module in named_layers(model):  # not PEFT's wrappers, which save what is theirs
        if hasattr(type(module), _NAME) and _NAME not in module.__dict__ and _is_adapted(module):
            module.__dict__[_NAME] = Saving(module)


def free_saving(model: nn.Module) -> None:
    """Take it off those without adapters."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_NAME), Saving) and not _is_adapted(module):
            del module.__dict__[_NAME]
