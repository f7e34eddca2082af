"""`import nerine.lycoris as lycoris`: LyCORIS's names, with nerine behind them.

    network = lycoris.create_lycoris(model, 1.0, linear_dim=8, linear_alpha=4, algo="lokr")
    network.apply_to()

The table says where each name lives; each is imported when it is first asked for. What differs from LyCORIS, and by
how much, is in docs/migrating-from-lycoris.md.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nerine.integrations.lycoris.presets import (
        AlgoOverride,
        AlgoSpec,
        PresetConfig,
        PresetValidationError,
        describe_algo,
        list_algorithms,
        list_builtin_presets,
    )
    from nerine.integrations.lycoris.timesteps import (
        clear_timestep_mask,
        compute_timestep_mask,
        get_timestep_mask,
        set_timestep_mask,
    )

HOMES = {
    "nerine.integrations.lycoris.modules": (
        "ButterflyOFTModule",
        "DiagOFTModule",
        "DyLoraModule",
        "FullModule",
        "GLoRAModule",
        "IA3Module",
        "LoConModule",
        "LohaModule",
        "LokrModule",
        "MODULE_LIST",
        "NormModule",
        "TLoraModule",
        "get_module",
        "make_module",
    ),
    "nerine.integrations.lycoris.presets": (
        "AlgoOverride",
        "AlgoSpec",
        "BUILTIN_PRESET_CONFIGS",
        "PRESET",
        "PresetConfig",
        "PresetValidationError",
        "VALID_PRESET_KEYS",
        "describe_algo",
        "list_algorithms",
        "list_builtin_presets",
        "read_preset",
    ),
    "nerine.integrations.lycoris.timesteps": (
        "clear_timestep_mask",
        "compute_timestep_mask",
        "get_timestep_mask",
        "set_timestep_mask",
    ),
    "nerine.integrations.lycoris.wrapper": ("LycorisNetwork", "create_lycoris", "create_lycoris_from_weights"),
}
logger = logging.getLogger("nerine")
_HOME = {name: home for home, names in HOMES.items() for name in names}
_SUBMODULES = ("config", "config_sdk", "functional", "kohya", "modules", "utils", "wrapper")

__all__ = [
    "AlgoOverride",
    "AlgoSpec",
    "PresetConfig",
    "PresetValidationError",
    "clear_timestep_mask",
    "compute_timestep_mask",
    "describe_algo",
    "get_timestep_mask",
    "list_algorithms",
    "list_builtin_presets",
    "logger",
    "set_timestep_mask",
]
__all__ += sorted(set(_HOME) - set(__all__))


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"nerine.lycoris.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'nerine.lycoris' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
