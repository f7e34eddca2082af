"""LyCORIS's wrapper: `create_lycoris` and `create_lycoris_from_weights`, for any module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nerine.errors import OptionError
from nerine.integrations.lycoris.arguments import defaults_of, named_preset, parse_arguments
from nerine.integrations.lycoris.modules import hosted_of
from nerine.integrations.lycoris.network import LycorisNetwork
from nerine.integrations.lycoris.presets import PresetConfig
from nerine.integrations.lycoris.settings import noise_of
from nerine.integrations.lycoris.sources import read_for
from nerine.model.adapter import Noise

__all__ = ["LycorisNetwork", "create_lycoris", "create_lycoris_from_weights"]


def _table(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, Mapping | PresetConfig):
        raise OptionError(f"{name}: expected a table such as {{'target_module': ['Attention']}}, got {value!r}")
    return value


def create_lycoris(
    module: nn.Module,
    multiplier: float = 1.0,
    linear_dim: int | None = 4,
    linear_alpha: float | None = 1,
    warn_on_unmatched: bool = True,
    **kwargs: Any,
) -> LycorisNetwork:
    """Adapters for the layers of `module`, not on them before `apply_to`.

    The arguments are LyCORIS's `network_args`: algo, conv_dim, conv_alpha, dropout, rank_dropout, module_dropout,
    use_tucker, use_scalar, rs_lora, block_size, train_norm, constraint, rescaled, dora_wd, wd_on_output, full_matrix,
    decompose_both, factor, unbalanced_factorization, bypass_mode, preset (a name, a file, a table or a PresetConfig).
    Values may be text. `apply_preset` is a table that is applied after the preset: SimpleTuner hands its own on.

    Raises:
        OptionError: an unknown argument, or a bad value.
        TargetError: no layer matches.
    """
    given, preset = parse_arguments(kwargs, "create_lycoris", {"apply_preset": _table})
    LycorisNetwork.apply_preset(named_preset(preset))
    LycorisNetwork.apply_preset(given.pop("apply_preset", None) or {})
    dim = 4 if linear_dim is None else int(linear_dim)
    defaults = defaults_of(given, dim, linear_alpha)
    return LycorisNetwork(
        module,
        multiplier=multiplier,
        lora_dim=dim,
        conv_lora_dim=defaults.conv_dim,
        alpha=linear_alpha,
        conv_alpha=defaults.conv_alpha,
        network_module=given.get("algo") or "lora",
        train_norm=bool(given.get("train_norm")),
        warn_on_unmatched=warn_on_unmatched,
        train_llm_adapter=bool(given.get("train_llm_adapter")),
        **{key: value for key, value in defaults.options.items() if key != "algo"},
    )


def create_lycoris_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | None,
    module: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[LycorisNetwork, Mapping[str, Tensor]]:
    """The adapters of a file (in any dialect) or of its tensors for `module`, not on it before `apply_to`; and the
    tensors. Of `kwargs` the dropouts count; what else they say of adapters the file knows better. Pickles are read
    without running anything in them.

    Raises:
        FormatError: the file is damaged, or nothing in it belongs to `module`.
        ShapeError: a tensor does not fit its layer.
    """
    given, _ = parse_arguments(kwargs, "create_lycoris_from_weights", {"apply_preset": _table})
    network = LycorisNetwork(module, init_only=True)
    report, fittings, tensors = read_for(module, file, weights_sd)
    prefix = LycorisNetwork.LORA_PREFIX
    noise = Noise(**noise_of(given))
    network.loras = [
        hosted_of(f, f"{prefix}_{f.spot.path}".replace(".", "_"), network.context, noise) for f in fittings
    ]
    network.report = report
    network.set_multiplier(multiplier)
    network.count()
    return network, tensors
