"""Which layers of a part a preset chooses: by structure for the named ones, by LyCORIS's rules for files and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from nerine.errors import OptionError, TargetError, nearest
from nerine.integrations.kohya.layers import Choice
from nerine.integrations.kohya.parts import Part
from nerine.integrations.lycoris.arguments import named_preset
from nerine.integrations.lycoris.building import overrides
from nerine.integrations.lycoris.presets import list_builtin_presets
from nerine.integrations.lycoris.selection import selected
from nerine.model.layer import layer_kind
from nerine.model.presets import PRESETS, preset_of
from nerine.model.presets import choose as by_structure

__all__ = ["choose", "enables_conv", "resolve"]

Resolved = str | Mapping[str, Any]

_ADAPTER = "llm_adapter"  # of Anima, which train_llm_adapter asks for


def resolve(preset: Any) -> Resolved:
    """The name of a preset of structure as it is; the table of LyCORIS's rules that anything else means.

    Raises:
        OptionError: no such preset.
    """
    if isinstance(preset, str) and preset in PRESETS:
        return preset
    if isinstance(preset, str) and not Path(preset).is_file():
        raise OptionError(f"preset: {preset!r} is no file and no preset. {nearest(preset, PRESETS)}")
    return named_preset(preset)


def choose(part: Part, preset: Resolved, given: Mapping[str, Any]) -> list[Choice]:
    """The layers of a part, in the order of its model."""
    return _by_structure(part, preset, given) if isinstance(preset, str) else _by_rules(part, preset, given)


def _by_structure(part: Part, preset: str, given: Mapping[str, Any]) -> list[Choice]:
    component = "text_encoder" if part.number else "denoiser"
    where = {"": part.model}
    adapter = getattr(part.model, _ADAPTER, None)
    if given.get("train_llm_adapter") and isinstance(adapter, nn.Module):
        where[f"{_ADAPTER}."] = adapter
    found: list[Choice] = []
    for lead, model in where.items():
        with suppress(TargetError):  # the other parts may have some
            chosen = by_structure(model, preset_of(preset), component)
            found += [_choice(part, lead + path, path in chosen.on_input) for path in chosen.paths]
    if given.get("train_norm") and part.number == 0:
        found += _norms(part, [choice.path for choice in found])
    order = {path: i for i, (path, _) in enumerate(part.model.named_modules())}
    return sorted(found, key=lambda choice: order.get(choice.path, len(order)))


def _choice(part: Part, path: str, on_input: bool) -> Choice:
    return Choice(path, part.lora_name(path), {"train_on_input": True} if on_input else {})


def _norms(part: Part, paths: Sequence[str]) -> list[Choice]:
    """The norms beside the chosen layers, in modules that stand in a numbered block."""
    above = {path[:i] for path in paths for i, letter in enumerate(path) if letter == "."}
    found = []
    for path, module in part.model.named_modules():
        parent = path.rpartition(".")[0]
        if layer_kind(module) == "norm" and parent in above and any(word.isdigit() for word in parent.split(".")):
            found.append(Choice(path, part.lora_name(path)))
    return found


def _by_rules(part: Part, table: Mapping[str, Any], given: Mapping[str, Any]) -> list[Choice]:
    """What a preset of LyCORIS's, whose sections are for the denoiser and the text encoders, chooses."""
    known = list_builtin_presets()["full"].to_dict()
    side = "text_encoder" if part.number else "unet"
    target_modules = table.get(f"{side}_target_module", known[f"{side}_target_module"])
    target_names = table.get(f"{side}_target_name", known[f"{side}_target_name"])
    chosen = selected(
        part.model,
        table,
        target_modules=target_modules or [],
        target_names=target_names or [],
        train_norm=bool(given.get("train_norm")),
        train_llm_adapter=bool(given.get("train_llm_adapter")),
    )
    return [Choice(path, part.lora_name(path), overrides(own, path)) for path, own in chosen.items()]


def enables_conv(preset: Resolved) -> bool:
    """Whether a preset takes convolutions with a kernel; one of structure has chosen its layers already."""
    return isinstance(preset, str) or bool(preset.get("enable_conv", True))
