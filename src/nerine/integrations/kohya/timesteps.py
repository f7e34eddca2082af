"""The timesteps of a batch, read where the denoiser is called: no host of sd-scripts tells its network about them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nerine.errors import TargetError
from nerine.model.adapter import Context

__all__ = ["listen"]

_NAMES = ("timesteps", "timestep", "t")


def listen(denoiser: nn.Module, context: Context) -> RemovableHandle:
    """Tell `context` the timesteps of every call of `denoiser`, in thousandths, with the noise growing with time.

    Raises:
        TargetError: its forward has no argument of the usual names.
    """
    known = list(inspect.signature(denoiser.forward).parameters)
    name = next((name for name in _NAMES if name in known), None)
    if name is None:
        raise TargetError(
            f"{type(denoiser).__name__}: tlora follows the timesteps, and its forward has none of {', '.join(_NAMES)}"
        )
    runs_down = "cap_feats" in known  # Lumina: one is the clean picture
    place = known.index(name)

    def hear(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = kwargs.get(name, args[place] if len(args) > place else None)
        if isinstance(time, Tensor | int | float):
            told = torch.as_tensor(time).detach()
            if told.is_floating_point():
                told = torch.where(told <= 1, told * 1000, told)  # some count from 0 to 1
            context.timestep = (1000 - told if runs_down else told).float()

    return denoiser.register_forward_pre_hook(hear, with_kwargs=True)
