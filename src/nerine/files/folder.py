"""Where an adapter is kept: one file, or a folder with settings beside the tensors, as PEFT has it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nerine.errors import FormatError
from nerine.files.atomic import write_json
from nerine.files.dialects.base import Dialect
from nerine.files.store import Outgoing, Source, open_file, write_file

__all__ = ["open_adapter", "write"]

CONFIG = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
LARGEST_CONFIG = 16 * 2**20  # bytes; real ones have some thousands


@contextmanager
def open_adapter(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Iterator[Source]:
    """Open a file, or the tensors of a PEFT folder with the settings beside them as `Source.config`.

    Raises:
        FormatError: nothing of the kind is there, it is damaged, or it is a pickle and those are not allowed.
    """
    place = Path(path)
    file = place
    if place.is_dir():
        found = [place / name for name in TENSORS if (place / name).is_file()]
        if not found:
            there = ", ".join(sorted(p.name for p in place.iterdir())[:5]) or "nothing"
            raise FormatError(f"{place}: expected {TENSORS[0]} in this folder, found {there}")
        file = found[0]
    with open_file(file, allow_pickle=allow_pickle) as source:
        beside = file.parent / CONFIG
        if file.name in TENSORS and beside.is_file():
            source.config = _config(beside)
        yield source


def _config(file: Path) -> Mapping[str, Any]:
    if file.stat().st_size > LARGEST_CONFIG:
        raise FormatError(f"{file}: {file.stat().st_size:,} bytes, expected settings of at most {LARGEST_CONFIG:,}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FormatError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise FormatError(f"{file}: expected a table of settings, found {type(values).__name__}")
    return values


def write(
    path: str | os.PathLike[str],
    dialect: Dialect,
    tensors: Sequence[Outgoing],
    metadata: Mapping[str, str],
    config: Mapping[str, Any],
    hashes: bool = False,
) -> int:
    """Write a file, or a folder where the dialect is one; the number of bytes.

    Raises:
        FormatError: a folder is expected and a file is given or the other way round, or the folder above is missing.
    """
    place = Path(path)
    if not dialect.folder:
        if place.is_dir():
            raise FormatError(
                f"{place}: the {dialect.name} dialect is one file, and this is a folder; name a file in it"
            )
        return write_file(place, tensors, metadata, hashes=hashes)
    if place.suffix or place.is_file():
        raise FormatError(f"{place}: the {dialect.name} dialect is a folder; give its name, without .safetensors")
    if not place.parent.is_dir():
        raise FormatError(f"{place}: the folder {place.parent} does not exist; create it first")
    place.mkdir(exist_ok=True)
    size = write_file(place / TENSORS[0], tensors, metadata, hashes=hashes)
    return size + write_json(place / CONFIG, config)
