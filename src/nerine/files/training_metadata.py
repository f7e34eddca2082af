"""Metadata for other programs: the few `ss_` entries that they look at, and `modelspec`. Pure functions of what they
are told; what nobody said is left out, the time of day included, so that the same file has the same bytes.

Source: sd-scripts (SS_METADATA_MINIMUM_KEYS; the word "Dynamic" is that of its resize_lora), and ModelSpec 1.0.1,
https://github.com/Stability-AI/ModelSpec, in the form that sd-scripts writes.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from typing import Any

from nerine.algorithms import Algorithm, DoRA
from nerine.errors import OptionError, nearest

__all__ = ["MODELSPEC", "kohya_metadata", "modelspec_metadata"]

_MIXED = "Dynamic"
MODELSPEC = (
    "architecture",
    "implementation",
    "title",
    "resolution",
    "description",
    "author",
    "date",
    "hash_sha256",
    "implementation_version",
    "license",
    "usage_hint",
    "thumbnail",
    "tags",
    "merged_from",
    "trigger_phrase",
    "prediction_type",
    "timestep_range",
    "encoder_layer",
    "preprocessor",
    "is_negative_embedding",
    "unet_dtype",
    "vae_dtype",
)


def kohya_metadata(
    layers: Mapping[str, Algorithm],
    *,
    module: str = "nerine.kohya",
    base_model: str | None = None,
    v2: bool | None = None,
    network_args: Mapping[str, Any] | None = None,
    user: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The `ss_` entries about adapters of these layers; entries of `user` are added and win.

    Rank and alpha are "Dynamic" where layers differ, and left out where no layer has any. `network_args` replaces the
    settings that all layers share.
    """
    settings = [_flat(algorithm) for algorithm in layers.values()]
    ranked = [s for s in settings if "rank" in s]
    alphas = [s["rank"] if s["alpha"] is None else s["alpha"] for s in ranked if "alpha" in s]
    args = _shared(settings) if network_args is None else {key: str(value) for key, value in network_args.items()}
    found = {
        "ss_v2": None if v2 is None else str(bool(v2)),
        "ss_base_model_version": base_model,
        "ss_network_module": module,
        "ss_network_dim": _one(str(s["rank"]) for s in ranked),
        "ss_network_alpha": _one(str(float(alpha)) for alpha in alphas),
        "ss_network_args": json.dumps(args, sort_keys=True) if args else None,
    }
    return {**{key: value for key, value in found.items() if value is not None}, **(user or {})}


def modelspec_metadata(*, user: Mapping[str, str] | None = None, **fields: str | int | None) -> dict[str, str]:
    """`modelspec.` entries from the fields that are given (not None); entries of `user` are added and win.

    Raises:
        OptionError: architecture, implementation or title is missing, a field is unknown, or the date is not ISO 8601.
    """
    given = {key: str(value) for key, value in fields.items() if value is not None}
    for key in given:
        if key not in MODELSPEC:
            raise OptionError(f"modelspec has no field {key!r}. {nearest(key, MODELSPEC)}")
    lacking = [key for key in MODELSPEC[:3] if key not in given and f"modelspec.{key}" not in (user or {})]
    if lacking:
        raise OptionError(f"modelspec asks for {', '.join(MODELSPEC[:3])}; give {' and '.join(lacking)} as well")
    try:
        datetime.datetime.fromisoformat(given.get("date", "2000-01-01"))
    except ValueError as error:
        raise OptionError(f"modelspec: expected a date like 2024-12-31 or 2024-12-31T23:59:59 ({error})") from None
    told = {f"modelspec.{key}": given[key] for key in MODELSPEC if key in given}
    return {"modelspec.sai_model_spec": "1.0.1", **told, **(user or {})}


def _flat(algorithm: Algorithm) -> dict[str, Any]:
    """Settings of an algorithm by the names that LyCORIS gives them, where it has any."""
    if isinstance(algorithm, DoRA):
        return {**_flat(algorithm.inner), "dora_wd": True, "wd_on_output": algorithm.axis == "out"}
    settings = dict(algorithm.settings())
    return {"algo": settings.pop("algorithm"), **settings}


def _shared(settings: list[dict[str, Any]]) -> dict[str, str]:
    """What all layers have in common, rank and alpha apart."""
    first = settings[0] if settings else {}
    own = {key: value for key, value in first.items() if key not in ("rank", "alpha") and value is not None}
    return {key: str(value) for key, value in own.items() if all(s.get(key) == value for s in settings)}


def _one(values: Iterable[str]) -> str | None:
    found = set(values)
    return _MIXED if len(found) > 1 else next(iter(found), None)
