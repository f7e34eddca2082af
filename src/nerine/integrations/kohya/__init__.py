"""`--network_module nerine.kohya`: nerine as a network of sd-scripts.

`create_network` makes fresh adapters from `--network_dim`, `--network_alpha` and `--network_args`,
`create_network_from_weights` those of a file. What the network offers is in `network.KohyaNetwork`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nerine.errors import OptionError
from nerine.integrations.kohya.arguments import ARGUMENTS
from nerine.integrations.kohya.network import KohyaNetwork
from nerine.integrations.kohya.presets import enables_conv, resolve
from nerine.integrations.lycoris.arguments import defaults_of, parse_arguments
from nerine.integrations.lycoris.settings import logger, noise_of
from nerine.integrations.lycoris.sources import read_for
from nerine.model.adapter import Noise

__all__ = ["KohyaNetwork", "LycorisNetworkKohya", "create_network", "create_network_from_weights"]

LycorisNetworkKohya = KohyaNetwork  # what LyCORIS calls it; `create_network` makes one


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module | None,
    neuron_dropout: float | None = None,
    warn_on_unmatched: bool = True,
    **kwargs: Any,
) -> KohyaNetwork:
    """Fresh adapters for text encoders and denoiser, not on them before `apply_to`.

    `text_encoder` is a model, a list of models, or None. `kwargs` are the `network_args`, as text or as values.

    Raises:
        OptionError: an unknown argument, or a bad value.
        TargetError: no layer gets an adapter.
    """
    if kwargs.get("dropout") is None:
        kwargs["dropout"] = neuron_dropout
    given, preset = parse_arguments(kwargs, "network_args", ARGUMENTS)
    if given.get("split_qkv") and (given.get("algo") or "lora") not in ("lora", "locon"):
        raise OptionError(
            f"network_args: split_qkv: only lora can be split and written as one layer, not {given['algo']}"
        )
    preset = resolve(preset)
    dim = 4 if network_dim is None else int(network_dim)
    defaults = defaults_of(given, dim, 1.0 if network_alpha is None else float(network_alpha), enables_conv(preset))
    if given.get("algo") == "ia3" and preset != "ia3":
        logger.warning("(IA)³ was made for keys, values and feed-forward layers: preset=ia3 chooses those")
    return KohyaNetwork(text_encoder, unet, defaults, preset=preset, arguments=given, multiplier=multiplier)


def create_network_from_weights(
    multiplier: float,
    file: str | os.PathLike[str] | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module | None,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[KohyaNetwork, Mapping[str, Tensor]]:
    """The adapters of a file, in any dialect, with their values, not on the models before `apply_to` or `merge_to`;
    and the file's tensors. Of `kwargs` only those that act in training count here: dropouts and learning rates.

    Raises:
        FormatError: the file is damaged, or nothing in it belongs to these models.
        ShapeError: a tensor does not fit its layer.
        OptionError: an unknown argument.
    """
    given, _ = parse_arguments(kwargs, "network_args", ARGUMENTS)
    network = KohyaNetwork.of(text_encoder, unet, multiplier)
    report, fittings, tensors = read_for(network.model, file, weights_sd)
    noise = Noise() if for_inference else Noise(**noise_of(given))
    network.fill(fittings, report, tensors, noise, given)
    network.train(not for_inference)  # programs that only make pictures never say so
    return network, tensors
