"""The header of a safetensors file, believed in nothing: every number in it is checked before a tensor is allocated.

Eight bytes of length, that much JSON, then the data. What the `safetensors` library refuses is refused here, and more:
names that occur twice, headers over 32 MiB (theirs end at 100 MB; real ones have some megabytes, most of it captions),
and formats that torch has not.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from nerine.errors import shown

__all__ = ["CODES", "Bad", "Entry", "read_header"]

LARGEST = 32 * 2**20  # bytes of header; read as Python objects it takes some times as much

# In the order in which safetensors writes formats, from the last on.
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_DTYPES: Mapping[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items()}
CODES: Mapping[torch.dtype, tuple[int, str]] = {_DTYPES[code]: (i, code) for i, code in enumerate(_NAMES)}


class Bad(Exception):
    """What is wrong with a header, in words; the caller says of which file."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its format and shape, and where its bytes are, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors by name and the metadata of an open file of `size` bytes.

    Raises:
        Bad: the file is no whole safetensors file.
    """
    if size < 8:
        raise Bad(f"it has {size} bytes, and eight say how long the header is")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(LARGEST, size - 8):
        raise Bad(f"its header would have {length:,} bytes, of at most {min(LARGEST, size - 8):,}")
    values = _parsed(file.read(length))
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Bad("its metadata is not text by name")
    entries = {name: _entry(name, value, 8 + length) for name, value in values.items()}
    _check_places(entries, 8 + length, size)
    return entries, metadata


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise Bad(f"its header is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise Bad("its header is no JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(twice)} occurs twice")
    return values


def _entry(name: str, value: Any, data: int) -> Entry:
    where = shown(name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise Bad(f"{where} is not described by dtype, shape and data_offsets")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise Bad(f"{where} has the format {shown(str(value['dtype']), 20)}, of those known: {', '.join(_DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise Bad(f"{where} has no shape and place of whole numbers")
    start, stop = offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise Bad(f"{where} has {stop - start:,} bytes for a shape {tuple(shape)} of {value['dtype']}")
    return Entry(dtype, tuple(shape), data + start, data + stop)


def _is_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_places(entries: Mapping[str, Entry], data: int, size: int) -> None:
    """Tensors one after the other, without holes, to the end of the file."""
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise Bad(f"{shown(name)} begins at byte {entry.start:,}, expected {at:,}")
        at = entry.stop
    if at != size:
        raise Bad(f"its tensors end at byte {at:,}, and the file at {size:,}")
