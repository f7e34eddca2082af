"""LyCORIS's presets as data: which layers are trained (`PresetConfig`), and what some of them get (`AlgoOverride`).

What an algorithm can be told (`AlgoSpec`) is read from the settings of nerine's own, under LyCORIS's words for them. A
word that nobody knows is an error that names the nearest one. `selection` says which layers a preset chooses.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nerine.errors import OptionError, nearest
from nerine.integrations.lycoris.algorithms import ALGO_REGISTRY, OPTIONS, AlgoSpec
from nerine.model import toml

__all__ = [
    "ALGO_REGISTRY",
    "BUILTIN_PRESET_CONFIGS",
    "PRESET",
    "VALID_PRESET_KEYS",
    "AlgoOverride",
    "AlgoSpec",
    "PresetConfig",
    "PresetValidationError",
    "describe_algo",
    "list_algorithms",
    "list_builtin_presets",
    "read_preset",
]

_MAPS = ("module_algo_map", "name_algo_map")
_FLAGS = ("enable_conv", "use_fnmatch")
VALID_PRESET_KEYS: tuple[str, ...] = (
    "enable_conv",
    "target_module",
    "target_name",
    *_MAPS,
    "lora_prefix",
    "use_fnmatch",
    "unet_target_module",
    "unet_target_name",
    "text_encoder_target_module",
    "text_encoder_target_name",
    "exclude_name",
)


class PresetValidationError(OptionError, ValueError):
    """A preset with a key, an algorithm or an option that does not exist, or a value of the wrong kind."""


def describe_algo(name: str) -> AlgoSpec:
    """What an algorithm can be told.

    Raises:
        PresetValidationError: there is none of that name.
    """
    found = ALGO_REGISTRY.get(str(name).lower())
    if found is None:
        raise PresetValidationError(f"algo: no algorithm is called {name!r}. {nearest(str(name), ALGO_REGISTRY)}")
    return found


def list_algorithms() -> Iterable[AlgoSpec]:
    """What each algorithm can be told."""
    return ALGO_REGISTRY.values()


@dataclass
class AlgoOverride:
    """What the layers of a class or a name get: an algorithm (None: that of the network), and options of their own."""

    algo: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> AlgoOverride:
        data = dict(mapping)
        return cls(data.pop("algo", None), data)

    def to_dict(self) -> dict[str, Any]:
        own = {} if self.algo is None else {"algo": self.algo}
        return {**copy.deepcopy(self.options), **own}

    def validate(self) -> None:
        """Raises `PresetValidationError` for an algorithm or an option that does not exist."""
        spec = None if self.algo is None else describe_algo(self.algo)
        for option in self.options:
            if spec is not None and not spec.supports(option):
                known = nearest(option, spec.supported_args)
                raise PresetValidationError(f"{spec.name} has no option {option!r}. {known}")
            if spec is None and option not in OPTIONS:
                raise PresetValidationError(f"no algorithm has an option {option!r}. {nearest(option, OPTIONS)}")


@dataclass
class PresetConfig:
    """A preset; None is what it does not say. The keys are explained in `selection`."""

    enable_conv: bool | None = None
    target_module: list[str] | None = None
    target_name: list[str] | None = None
    module_algo_map: dict[str, AlgoOverride] = field(default_factory=dict)
    name_algo_map: dict[str, AlgoOverride] = field(default_factory=dict)
    lora_prefix: str | None = None
    use_fnmatch: bool | None = None
    unet_target_module: list[str] | None = None
    unet_target_name: list[str] | None = None
    text_encoder_target_module: list[str] | None = None
    text_encoder_target_name: list[str] | None = None
    exclude_name: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, strict: bool = False) -> PresetConfig:
        """A preset from a table. With `strict` the algorithms and options of both maps are checked too.

        Raises:
            PresetValidationError: an unknown key, or a value of the wrong kind.
        """
        for key in data:
            if key not in VALID_PRESET_KEYS:
                raise PresetValidationError(f"a preset has no key {key!r}. {nearest(str(key), VALID_PRESET_KEYS)}")
        return cls(**{key: _read(key, data[key], strict) for key in VALID_PRESET_KEYS if key in data})

    def to_dict(self) -> dict[str, Any]:
        """What the preset says, as a table."""
        data: dict[str, Any] = {}
        for key in VALID_PRESET_KEYS:
            value = getattr(self, key)
            if key in _MAPS:
                if value:
                    data[key] = {name: override.to_dict() for name, override in value.items()}
            elif value is not None:
                data[key] = copy.deepcopy(value)
        return {**data, **copy.deepcopy(self.extra)}

    def list_algorithms(self) -> Iterable[str]:
        """The algorithms that the two maps name, in their order."""
        for override in (*self.module_algo_map.values(), *self.name_algo_map.values()):
            if override.algo:
                yield override.algo


def _read(key: str, value: Any, strict: bool) -> Any:
    if key in _MAPS:
        return _read_map(key, value or {}, strict)
    if value is None:
        return None
    if key in _FLAGS:
        expected, is_right = "true or false", isinstance(value, bool)
    elif key == "lora_prefix":
        expected, is_right = "a word", isinstance(value, str)
    else:
        expected = "a list of names"
        is_right = isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
    if not is_right:
        raise PresetValidationError(f"{key}: expected {expected}, got {value!r}")
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


def _read_map(key: str, value: Any, strict: bool) -> dict[str, AlgoOverride]:
    if not isinstance(value, Mapping):
        raise PresetValidationError(f"{key}: expected a table for each {key.split('_')[0]}, got {value!r}")
    overrides = {}
    for name, entry in value.items():
        entry = entry.to_dict() if isinstance(entry, AlgoOverride) else entry or {}
        if not isinstance(entry, Mapping):
            raise PresetValidationError(f"{key}.{name}: expected a table such as {{algo = 'lokr'}}, got {entry!r}")
        overrides[name] = AlgoOverride.from_mapping(copy.deepcopy(dict(entry)))
        if strict:
            try:
                overrides[name].validate()
            except PresetValidationError as error:
                raise PresetValidationError(f"{key}.{name}: {error}") from None
    return overrides


# -- files -----------------------------------------------------------------------------------------------------------
def read_preset(preset_path: str | os.PathLike[str]) -> dict[str, Any]:
    """The preset of a .toml or .json file, as a table, its maps checked too.

    Raises:
        PresetValidationError: there is no such file, it is neither TOML nor JSON, or something in it does not exist.
    """
    path = Path(preset_path)
    where = f"preset {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PresetValidationError(f"{where}: expected a .toml or .json file: {error}") from None
    try:
        found = json.loads(text) if path.suffix.lower() == ".json" else toml.parse(text, where)
        if not isinstance(found, Mapping):
            raise PresetValidationError(f"expected a table of keys, found {type(found).__name__}")
        return PresetConfig.from_dict(found, strict=True).to_dict()
    except json.JSONDecodeError as error:
        raise PresetValidationError(f"{where}: not valid JSON: {error}") from None
    except OptionError as error:
        raise PresetValidationError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


# -- the presets that LyCORIS comes with -----------------------------------------------------------------------------
_CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_UNET = (
    "Transformer2DModel",
    *_CONVOLUTIONS,
    *["HunYuanDiTBlock", "DoubleStreamBlock", "SingleStreamBlock", "SingleDiTBlock"],
    *["MMDoubleStreamBlock", "MMSingleStreamBlock", "WanAttentionBlock"],
    *["HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock", "JointTransformerBlock", "FinalLayer"],
    *["QwenImageTransformerBlock", "LensTransformerBlock", "Ideogram4TransformerBlock", "ZImageTransformerBlock"],
    *["AceStepEncoderLayer", "AceStepDiTLayer", "TextFusionBlock"],
    *["Block", "PatchEmbed", "TimestepEmbedding", "LLMAdapterTransformerBlock"],
)
_GEMMA = ("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention")
_CLIP = ("CLIPAttention", "CLIPSdpaAttention")
_QWEN = ["Qwen3Attention", "Qwen3FlashAttention2", "Qwen3SdpaAttention", "Qwen3MLP"]
_TEXT = (*_CLIP, "CLIPMLP", "MT5Block", "BertLayer", *_GEMMA, "Gemma2MLP", *_QWEN)
_TEXT_ATTENTION = (*_CLIP, "BertAttention", "MT5LayerSelfAttention", *_GEMMA)
_ENDS, _TIME = ("conv_in", "conv_out"), ("time_embedding.linear_1", "time_embedding.linear_2")


def _preset(
    conv: bool,
    modules: Iterable[str] = (),
    names: Iterable[str] = (),
    text_modules: Iterable[str] = (),
    text_names: Iterable[str] = (),
    on_input: Iterable[str] = (),
) -> PresetConfig:
    return PresetConfig(
        enable_conv=conv,
        unet_target_module=list(modules),
        unet_target_name=list(names),
        text_encoder_target_module=list(text_modules),
        text_encoder_target_name=list(text_names),
        name_algo_map={name: AlgoOverride(options={"train_on_input": True}) for name in on_input},
    )


def list_builtin_presets() -> dict[str, PresetConfig]:
    """LyCORIS's own presets by name, made anew at each call. They are lists of classes and names, which suit only the
    models that have those; `nerine.attach` and the named presets of nerine's networks go by structure."""
    linear = [name for name in _UNET if name not in _CONVOLUTIONS[1:]]
    blocks = [name for name in _UNET if name not in _CONVOLUTIONS]
    inputs = ("mlp.fc2", "ff.net.2")
    return {
        "full": _preset(True, _UNET, (*_ENDS, *_TIME), _TEXT),
        "full-lin": _preset(False, linear, _TIME, _TEXT),
        "attn-mlp": _preset(False, blocks, (), _TEXT),
        "attn-only": _preset(False, ("CrossAttention", "SelfAttention"), (), _TEXT_ATTENTION),
        "unet-only": _preset(True, _UNET, (*_ENDS, *_TIME)),
        "unet-transformer-only": _preset(False, blocks),
        "unet-convblock-only": _preset(True, _CONVOLUTIONS, _ENDS),
        "ia3": _preset(False, (), ("to_k", "to_v", "ff.net.2"), (), ("k_proj", "v_proj", "mlp.fc2"), inputs),
    }


BUILTIN_PRESET_CONFIGS: Mapping[str, PresetConfig] = MappingProxyType(list_builtin_presets())
PRESET: Mapping[str, dict[str, Any]] = MappingProxyType(
    {name: preset.to_dict() for name, preset in list_builtin_presets().items()}
)
