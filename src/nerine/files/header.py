"""The header of a safetensors file, read and written here so that every claim in it is checked before memory of the
size that it claims is asked for. Knows names, number formats, shapes and places of tensors, never their content.

What the format itself forbids is refused (holes, overlaps, names that come twice, data beyond the end), and a little
more: a header above `LARGEST`, more than `MOST_AXES` axes, and anything in an entry beside its three fields.
Source: the safetensors format, https://github.com/huggingface/safetensors (8-byte length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple, NoReturn

import torch

from nerine.errors import FormatError, shown

__all__ = ["DTYPES", "LARGEST", "MOST_AXES", "Entry", "Header", "parse_header", "place", "read_header", "render_header"]

# Room for some 200,000 tensors beside metadata of several MB, while the worst JSON of this length (empty brackets,
# three bytes that become 64) still takes less than 1 GiB when it is parsed. safetensors itself stops at 100 MB.
LARGEST = 32 * 2**20
MOST_AXES = 32
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"

# In the order in which safetensors puts tensors of different formats into a file.
DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: i for i, dtype in enumerate(DTYPES.values())}


class Entry(NamedTuple):
    """One tensor of a file: number format, shape, and bytes `begin` to `end` of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a file says of its tensors; the data begins at byte `start` of the file."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    start: int


class _Wrong(ValueError):
    """What is wrong with a header, in words."""


# -- reading -----------------------------------------------------------------------------------------------------------
def read_header(file: BinaryIO, size: int, where: object) -> Header:
    """The header at the beginning of an open file of `size` bytes.

    Raises:
        FormatError: the file is no whole safetensors file.
    """
    try:
        head = file.read(8)
        if len(head) < 8:
            raise _Wrong(f"it ends after {len(head)} bytes, within the length of the header")
        length = int.from_bytes(head, "little")
        if length > LARGEST:
            raise _Wrong(f"it announces a header of {length:,} bytes, more than the {LARGEST:,} that are allowed")
        if length > size - 8:
            raise _Wrong(f"it announces a header of {length:,} bytes and has {size - 8:,}")
        text = file.read(length)
        if len(text) < length:
            raise _Wrong("it ended while it was read")
        return parse_header(text, size - 8 - length)
    except _Wrong as wrong:
        raise FormatError(
            f"{where} ({size:,} bytes): not a whole safetensors file ({wrong}). "
            "Was the download or the save interrupted? Fetch or save it again"
        ) from None


def parse_header(text: bytes, size: int) -> Header:
    """The header whose JSON is `text`, of a file with `size` bytes of data after it.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        return _parse(text, size)
    except RecursionError:  # of the parser, or of showing what it found
        raise _Wrong("its header is nested too deeply") from None


def _parse(text: bytes, size: int) -> Header:
    if not text.startswith(b"{"):
        raise _Wrong("its header does not begin with a brace")
    try:
        odd = b"-" in text or re.search(rb"[0-9]{20}", text)
        whole = _whole if odd else None  # a call for each number takes its time
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_int=whole, parse_constant=_no_number)
    except _Wrong:
        raise
    except ValueError as error:
        raise _Wrong(f"its header is no JSON: {shown(error)}") from None
    metadata = raw.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(_is_text(k) and _is_text(v) for k, v in metadata.items()):
        raise _Wrong("its metadata is not text to text")
    entries = {key: _entry(key, value) for key, value in raw.items()}
    _check_places(entries, size)
    return Header(entries, metadata, 8 + len(text))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Wrong(f"{shown(twice)} comes twice in its header")
    return found


def _whole(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 19:
        raise _Wrong(f"its header has the number {shown(digits, 30)}, expected one from 0 to 2**63")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise _Wrong(f"its header has {name} where a number should be")


def _is_text(value: object) -> bool:
    """Text that can be written again: JSON can spell halves of characters (\\ud800) that UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    return value.isascii() or not re.search("[\ud800-\udfff]", value)


def _is_counts(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MOST_AXES:
        return False
    return all(type(n) is int and n < 2**63 for n in value)  # a bool is an int as well, and no count


def _brief(value: object) -> str:
    """The beginning of a value, without walking through all of it."""
    return shown(reprlib.repr(value), 80)


def _entry(key: str, value: object) -> Entry:
    name = shown(key)
    if not _is_text(key):
        raise _Wrong(f"the name {name} is no text")
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise _Wrong(f"{name}: expected dtype, shape and data_offsets, and these alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Wrong(f"{name}: its dtype is {_brief(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _is_counts(shape):
        raise _Wrong(f"{name}: its shape is {_brief(shape)}, expected at most {MOST_AXES} whole numbers below 2**63")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Wrong(f"{name}: its data_offsets are {_brief(offsets)}, expected a beginning and an end")
    itemsize = DTYPES[dtype].itemsize
    if math.prod(max(n, 1) for n in shape) * itemsize >= 2**63:
        raise _Wrong(f"{name}: its shape {_brief(shape)} is larger than any memory")
    begin, end = offsets
    needed = math.prod(shape) * itemsize
    if end - begin != needed:
        raise _Wrong(f"{name}: {dtype} of shape {_brief(shape)} takes {needed:,} bytes, and it has {end - begin:,}")
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _check_places(entries: Mapping[str, Entry], size: int) -> None:
    """One tensor after the other, from the first byte of the data to the last."""
    at = 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != at:
            what = "overlaps the one before it" if entry.begin < at else "leaves a hole before it"
            raise _Wrong(f"{shown(key)} {what}: it begins at {entry.begin:,} instead of {at:,}")
        at = entry.end
    if at != size:
        raise _Wrong(f"its tensors take {at:,} bytes, and it has {size:,}")


# -- writing -----------------------------------------------------------------------------------------------------------
def place(sizes: Iterable[tuple[str, tuple[int, ...], torch.dtype]], where: object) -> dict[str, Entry]:
    """Entries in the order of the file: wide formats first, then by name, which is safetensors' own order.

    Raises:
        FormatError: a format that the file cannot hold, or a name that comes twice or is no text.
    """
    known = list(sizes)
    for key, shape, dtype in known:
        if dtype not in _NAMES:
            raise FormatError(f"{where}: {shown(key)} is {dtype}, which this file format cannot hold")
        if not _is_text(key) or key == _METADATA:
            raise FormatError(f"{where}: {shown(key)} cannot be the name of a tensor")
        if len(shape) > MOST_AXES:
            raise FormatError(f"{where}: {shown(key)} has {len(shape)} axes, expected at most {MOST_AXES}")
    entries: dict[str, Entry] = {}
    at = 0
    for key, shape, dtype in sorted(known, key=lambda item: (_ORDER[item[2]], item[0])):
        if key in entries:
            raise FormatError(f"{where}: {shown(key)} would be written twice; names of tensors must differ")
        end = at + math.prod(shape) * dtype.itemsize
        entries[key] = Entry(dtype, tuple(shape), at, end)
        at = end
    return entries


def render_header(entries: Mapping[str, Entry], metadata: Mapping[str, str], where: object) -> bytes:
    """The first bytes of a file, from its length to where the data begins; the same content gives the same bytes.

    Raises:
        FormatError: metadata that is not text to text, or more than a header may hold.
    """
    for key, value in metadata.items():
        if not _is_text(key) or not _is_text(value):
            raise FormatError(f"{where}: metadata is text to text, got {shown(key)}: {shown(value)}")
    table: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
    for key, (dtype, shape, begin, end) in entries.items():
        table[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST:
        raise FormatError(
            f"{where}: names and metadata take {len(text):,} bytes, more than the {LARGEST:,} that a header may have; "
            "write fewer tensors or less metadata into one file"
        )
    return len(text).to_bytes(8, "little") + text
