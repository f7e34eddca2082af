"""LyCORIS's `network_args`: parsed once, strictly, with the preset apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nerine.errors import OptionError, nearest
from nerine.integrations.arguments import as_bool, as_float, as_int, parse
from nerine.integrations.lycoris.building import Defaults
from nerine.integrations.lycoris.presets import PresetConfig, list_builtin_presets, read_preset
from nerine.integrations.lycoris.settings import LAYER_OPTIONS, current, ignores, logger

__all__ = ["defaults_of", "named_preset", "parse_arguments"]

_ARGUMENTS = {
    **{name: kind for name, kind in LAYER_OPTIONS.items() if name not in ("dim", "alpha")},
    "conv_dim": as_int,
    "conv_alpha": as_float,
    "train_norm": as_bool,
    "train_llm_adapter": as_bool,
    "preset": lambda name, value: "full" if value is None else value,
    "weight_decompose": as_bool,
}


def parse_arguments(
    kwargs: Mapping[str, Any], where: str, more: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Any]:
    """The parsed arguments, and the preset apart."""
    given = parse(current(kwargs), {**_ARGUMENTS, **(more or {})}, where)
    if given.pop("weight_decompose", False):
        logger.warning("weight_decompose is the name inside of modules, which LyCORIS ignores here; taken as dora_wd")
        given["dora_wd"] = True
    note = ignores(given)
    if note:
        logger.warning("%s", note)
    return given, given.pop("preset", "full")


def named_preset(preset: Any) -> dict[str, Any]:
    """A preset as a table: a builtin name, the path of a file, a table, or a PresetConfig.

    Raises:
        OptionError: no such name, and no such file.
        PresetValidationError: an unknown key.
    """
    if isinstance(preset, PresetConfig):
        return preset.to_dict()
    if isinstance(preset, Mapping):
        return PresetConfig.from_dict(preset).to_dict()
    known = list_builtin_presets()
    if preset in known:
        return known[preset].to_dict()
    if not Path(preset).is_file():
        raise OptionError(f"preset: {preset!r} is no file and no preset. {nearest(str(preset), known)}")
    return read_preset(preset)


def defaults_of(given: Mapping[str, Any], dim: int, alpha: float | None, conv: bool = True) -> Defaults:
    """Ranks, alphas and options of all layers; a conv_dim or conv_alpha of 0 is that of linear layers. Without `conv`
    convolutions with a kernel have none."""
    options = {key: value for key, value in given.items() if key in LAYER_OPTIONS}
    alpha = None if alpha is None else float(alpha)
    if given.get("conv_dim") == 0:
        logger.warning(
            "conv_dim=0 means the rank of linear layers, as in LyCORIS; preset=full-lin leaves convolutions out"
        )
    return Defaults(
        dim, alpha, (given.get("conv_dim") or dim) if conv else 0, given.get("conv_alpha") or alpha, options
    )
