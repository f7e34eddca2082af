"""Optimisers by name, and the groups of values that they move at rates of their own."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nerine.errors import MissingExtra, OptionError, nearest
from nerine.model.network import Network
from nerine.train.settings import OptimizerSettings

__all__ = ["class_of", "evaluating", "groups_of", "known_optimizers", "make_optimizer", "set_rate"]

# Name here: module, class, and what brings it.
_OTHERS = {
    "prodigy": ("prodigyopt", "Prodigy", "optimizers"),
    "schedulefree-adamw": ("schedulefree", "AdamWScheduleFree", "optimizers"),
    "schedulefree-radam": ("schedulefree", "RAdamScheduleFree", "optimizers"),
    "schedulefree-sgd": ("schedulefree", "SGDScheduleFree", "optimizers"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "quant"),
    "adam8bit": ("bitsandbytes.optim", "Adam8bit", "quant"),
    "pagedadamw8bit": ("bitsandbytes.optim", "PagedAdamW8bit", "quant"),
    "lion8bit": ("bitsandbytes.optim", "Lion8bit", "quant"),
    "lion": ("bitsandbytes.optim", "Lion", "quant"),
    "ademamix8bit": ("bitsandbytes.optim", "AdEMAMix8bit", "quant"),
}
_WITHOUT = ("LBFGS", "SparseAdam")  # a closure is asked for; only sparse gradients are taken
_FIRST = "initial_lr"


def known_optimizers() -> dict[str, str]:
    """{name: class} of those of torch, and the names of the others."""
    kinds = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    own = {name.lower(): name for name in kinds if name not in _WITHOUT}
    return {**own, **{name: kind for name, (_, kind, _) in _OTHERS.items()}}


def make_optimizer(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of that name over `groups` (as `groups_of` gives them); case and dashes do not matter.

    Raises:
        OptionError: there is none of that name, or it does not take an argument.
        MissingExtra: the package that brings it is not installed.
    """
    kind = class_of(settings.optimizer)
    known = [name for name in inspect.signature(kind).parameters if name not in ("self", "params", "lr", "args")]
    given = {}
    for name, value in settings.optimizer_args.items():
        if name not in known:
            raise OptionError(f"optimizer_args: {kind.__name__} has no {name!r}. {nearest(name, known)}")
        given[name] = _typed(name, value)
    try:
        made = kind(groups, lr=groups[0]["lr"], **given)
    except (TypeError, ValueError, AssertionError) as error:
        raise OptionError(f"optimizer {settings.optimizer} with {given}: {error}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise OptionError(f"optimizer: {kind.__name__} is no torch.optim.Optimizer")
    if is_schedule_free(made):
        made.train()  # type: ignore[attr-defined]
    return made


def is_schedule_free(optimizer: Any) -> bool:
    """Whether it moves other values than those that are meant to be used, and swaps the two."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def class_of(name: str) -> Any:
    """The class of that name.

    Raises:
        OptionError, MissingExtra: as `make_optimizer`.
    """
    plain = {known.replace("-", ""): known for known in known_optimizers()}
    found = plain.get(name.lower().replace("-", "").replace("_", ""))
    if found is None:
        raise OptionError(f"optimizer: there is no {name!r}. {nearest(name.lower(), known_optimizers())}")
    if found not in _OTHERS:
        return getattr(torch.optim, known_optimizers()[found])
    module, kind, extra = _OTHERS[found]
    try:
        return getattr(importlib.import_module(module), kind)
    except ImportError as error:
        raise MissingExtra(
            f'optimizer {found}: {module.split(".")[0]} is not installed: pip install "nerine[{extra}]"'
        ) from error


def _typed(name: str, value: Any) -> Any:
    """An argument; texts, as the command line gives them, are read as JSON where they are."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str):
        return value
    word = value.strip()
    if word.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[word.lower()]
    try:
        found = json.loads(f"[{word.strip('()[]')}]")
    except json.JSONDecodeError:
        return value
    if not found:
        raise OptionError(f"optimizer_args: {name} has no value")
    return tuple(found) if len(found) > 1 else found[0]


def groups_of(
    network: Network, settings: OptimizerSettings, lr: float, text_encoder_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups of one rate each: that of a layer's rule, of the text encoders, or `lr`; with LoRA+ the tensors that carry
    the size of the change (LoRA's up matrices) apart, at `lora_plus` times the rate. Layers at rate 0 are left out.

    Raises:
        OptionError: nothing is left to be trained.
    """
    found: dict[float, list[torch.nn.Parameter]] = {}
    for path, _, adapter in network.adapters():
        rate = lr
        if text_encoder_lr is not None and path.startswith("text_encoder"):
            rate = text_encoder_lr
        rate = rate if adapter.lr is None else adapter.lr
        for key, parameter in adapter.named_parameters(recurse=False):
            own = rate * settings.lora_plus if key in adapter.carriers else rate
            if own:
                found.setdefault(own, []).append(parameter)
            else:
                parameter.requires_grad_(False)
    if not found:
        raise OptionError("lr: every learning rate is 0, so that nothing would be trained")
    return [{"params": params, "lr": rate, _FIRST: rate} for rate, params in found.items()]


def set_rate(optimizer: Any, factor: float) -> None:
    """Every group's learning rate is its first one times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group[_FIRST] * factor


@contextmanager
@torch.no_grad()
def evaluating(optimizer: Any) -> Iterator[None]:
    """The values that are meant to be used, for the length of a `with` block: schedule-free optimisers move others.

    Afterwards those are the same to the bit, which their own way back would not give.
    """
    groups = optimizer.param_groups
    if not is_schedule_free(optimizer) or not any(group.get("train_mode", True) for group in groups):
        yield
        return
    moved = [(p, p.detach().clone()) for group in groups for p in group["params"]]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, value in moved:
            parameter.copy_(value)
