"""Which layers of a part a preset chooses: by structure for the named ones, by LyCORIS's rules for files and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nerine.errors import OptionError, TargetError, nearest
from nerine.integrations.kohya.layers import Choice
from nerine.integrations.kohya.parts import Part
from nerine.integrations.lycoris.building import overrides
from nerine.integrations.lycoris.presets import PresetConfig, list_builtin_presets
from nerine.integrations.lycoris.selection import selected
from nerine.integrations.lycoris.wrapper import named_preset
from nerine.model.layer import layer_kind
from nerine.model.presets import PRESETS, select

__all__ = ["choose", "enables_conv"]


def choose(part: Part, preset: Any, given: Mapping[str, Any]) -> list[Choice]:
    """The layers of a part, in the order of its model.

    Raises:
        OptionError: no such preset.
    """
    if isinstance(preset, str) and preset in PRESETS:
        return _by_structure(part, preset, given)
    if isinstance(preset, str) and not Path(preset).is_file():
        raise OptionError(f"preset: {preset!r} is no file and no preset. {nearest(preset, PRESETS)}")
    return _by_rules(part, named_preset(preset), given)


def _by_structure(part: Part, preset: str, given: Mapping[str, Any]) -> list[Choice]:
    try:
        paths = select(part.model, preset, "text_encoder" if part.number else "denoiser")
    except TargetError:
        paths = ()
    if not given.get("train_llm_adapter"):
        paths = tuple(path for path in paths if not path.startswith("llm_adapter."))
    found = [Choice(path, part.lora_name(path), _own_options(path, preset)) for path in paths]
    if given.get("train_norm") and part.number == 0:
        found += _norms(part, paths)
    order = {path: i for i, (path, _) in enumerate(part.model.named_modules())}
    return sorted(found, key=lambda choice: order.get(choice.path, len(order)))


def _own_options(path: str, preset: str) -> dict[str, Any]:
    """What a layer has of its own: (IA)³ acts on the inputs of feed-forward layers."""
    name = path.rpartition(".")[2]
    is_value = any(word in name for word in ("k", "v")) and any(word in path for word in ("attn", "attention", "Attention"))
    return {"train_on_input": True} if preset == "ia3" and not is_value else {}


def _norms(part: Part, paths: tuple[str, ...]) -> list[Choice]:
    """The norms beside the chosen layers, in modules that stand in a numbered block."""
    above = {path[: i] for path in paths for i, letter in enumerate(path) if letter == "."}
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


def enables_conv(preset: Any) -> bool:
    """Whether a preset takes convolutions with a kernel."""
    if isinstance(preset, str) and preset in PRESETS:
        return True  # it has chosen already
    table = preset.to_dict() if isinstance(preset, PresetConfig) else named_preset(preset)
    return bool(table.get("enable_conv", True))
