"""What nerine writes about an adapter beside its tensors: version of the numbers, settings, layers.

One JSON text under the key "nerine": `semantics` (a file is always computed by the rules of its number, see
docs/numerics), `version` of the library, `dialect`, `algorithms` (settings), `layers` ({path: index into algorithms}).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nerine.algorithms import Algorithm, build
from nerine.errors import FormatError, OptionError, shown

__all__ = ["SEMANTICS", "Meta", "read_meta", "write_meta"]

SEMANTICS = 1
_KEY = "nerine"
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Meta:
    """What a file says of itself. `layers` is empty where another program wrote it; `note` says what was unusable."""

    layers: Mapping[str, Algorithm] = field(default_factory=dict)
    semantics: int = SEMANTICS
    version: str = ""
    other: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    dialect: str = ""


def write_meta(
    layers: Mapping[str, Algorithm], version: str, other: Mapping[str, str], dialect: str = "lycoris"
) -> dict[str, str]:
    """Safetensors metadata (text to text) for adapters of these layers."""
    known: list[dict[str, Any]] = []
    index: dict[str, int] = {}
    for path in sorted(layers):
        settings = layers[path].settings()
        if settings not in known:
            known.append(settings)
        index[path] = known.index(settings)
    own = {"semantics": SEMANTICS, "version": version, "dialect": dialect, "algorithms": known, "layers": index}
    return {"format": "pt", **other, _KEY: json.dumps(own, sort_keys=True, separators=(",", ":"))}


def read_meta(metadata: Mapping[str, str], where: str, others: Sequence[type[Algorithm]] = ()) -> Meta:
    """The metadata of a file; damaged or foreign settings are no error, for the tensors say all that is needed.

    Raises:
        FormatError: the file was written by the rules of a newer version.
    """
    other = {key: value for key, value in metadata.items() if key != _KEY}
    if _KEY not in metadata:
        return Meta(other=other)
    try:
        own = json.loads(metadata[_KEY])
        semantics = int(own["semantics"])
        version, dialect = str(own.get("version", "")), str(own.get("dialect", ""))
    except _UNREADABLE as error:
        return Meta(
            other=other, note=f"the nerine metadata cannot be read ({shown(error)}); the tensors alone were used"
        )
    if semantics > SEMANTICS:
        raise FormatError(
            f"{where}: written by nerine {shown(version, 40) or 'of a later version'} with semantics "
            f"{shown(semantics, 40)}, while this one knows up to {SEMANTICS}; "
            "upgrade nerine to get the numbers it was trained with"
        )
    try:
        algorithms = [build(settings, others) for settings in own["algorithms"]]
        layers = {str(path): algorithms[int(i)] for path, i in own["layers"].items()}
    except (OptionError, *_UNREADABLE) as error:
        return Meta({}, semantics, version, other, f"the settings in the file are unusable ({shown(error)})", dialect)
    return Meta(layers, semantics, version, other, dialect=dialect)
