"""From chosen layers to modules: the rank that each gets, its algorithm, and the report of those left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nerine.errors import NerineError
from nerine.integrations.lycoris.hosted import Hosted
from nerine.integrations.lycoris.modules import class_of, new_adapter
from nerine.integrations.lycoris.settings import algorithm_for, ignores, layer_options
from nerine.model.adapter import Context
from nerine.model.mount import Spot
from nerine.model.offload import present
from nerine.model.targets import every_spot, spot_at
from nerine.site import Site

__all__ = ["Built", "Defaults", "Wish", "build", "overrides"]

_log = logging.getLogger("nerine")


@dataclass(frozen=True)
class Defaults:
    """What a layer gets where nothing more is said: ranks and alphas by kind of layer, and the other options.

    A rank of 0 leaves the kind out. "Convolutions" are those whose kernel is more than one point (by its first size).
    """

    dim: int
    alpha: float | None
    conv_dim: int
    conv_alpha: float | None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wish:
    """A layer that was chosen: its path, the name it bears in files, options of its own, and some rows of it alone."""

    path: str
    lora_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Built:
    """The modules made, and the layers left out with the reason."""

    modules: tuple[Hosted, ...]
    skipped: Mapping[str, str]


def build(
    model: nn.Module, wishes: Iterable[Wish], defaults: Defaults, multiplier: float, context: Context | None = None
) -> Built:
    """A module for each layer, in the order of the wishes.

    Raises:
        OptionError: an unknown option, or a bad value.
    """
    context = context or Context()
    listed = list(wishes)
    rows = sorted({wish.rows for wish in listed if wish.rows is not None})
    spots = every_spot(model, rows)
    modules: list[Hosted] = []
    skipped: dict[str, str] = {}
    with present(model):
        for wish in listed:
            made = _build_one(spots, wish, defaults, multiplier, context)
            if isinstance(made, str):
                skipped[wish.path] = made
            else:
                modules.append(made)
    for path, why in skipped.items():
        _log.info("left out: %s: %s", path, why)
    return Built(tuple(modules), skipped)


def _build_one(
    spots: Mapping[str, Spot], wish: Wish, defaults: Defaults, multiplier: float, context: Context
) -> Hosted | str:
    path = wish.path if wish.rows is None else f"{wish.path}[{wish.rows[0]}:{wish.rows[1]}]"
    if wish.path not in spots:
        return "no layer that can be adapted"
    spot = spot_at(spots, path)
    options = resolved(wish.options, defaults, spot.site)
    if options is None:
        return "its rank is 0"
    try:
        algorithm = algorithm_for(options, spot.site)
    except NerineError as error:
        raise type(error)(f"{path}: {error}") from None
    why = algorithm.unsuited(spot.site)
    if why:
        return why
    adapter = new_adapter(spot, algorithm, options, context, strength=float(multiplier))
    return class_of(algorithm).of(wish.lora_name, spot, adapter)


def resolved(own: Mapping[str, Any], defaults: Defaults, site: Site) -> dict[str, Any] | None:
    """The options of one layer; None where its rank is 0."""
    if site.kind == "norm":
        noise = {key: value for key, value in defaults.options.items() if key.endswith("_dropout")}
        return {**noise, **own, "algo": "norm"}
    is_conv = site.kind in ("conv", "transposed") and site.kernel[0] != 1
    dim, alpha = (defaults.conv_dim, defaults.conv_alpha) if is_conv else (defaults.dim, defaults.alpha)
    found = {**defaults.options, "dim": dim, "alpha": alpha}
    found.update({key: value for key, value in own.items() if key != "alpha" or value})
    if own.get("dim") is None and "dim" in own:
        found["dim"] = dim
    return found if found["dim"] else None


def overrides(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a rule of a preset, parsed, with a word on those that do nothing."""
    options = layer_options(given, where)
    note = ignores(options)
    if note:
        _log.warning("%s: %s", where, note)
    return options
