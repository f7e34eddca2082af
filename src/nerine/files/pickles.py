"""Files of torch's own kind (.pt, .ckpt, .bin): known by name or by content, read without running what they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerine.errors import FormatError, shown

__all__ = ["is_pickle", "read_pickle"]

_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl"}
_ZIP, _PICKLES = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_INSIDE = ("state_dict", "module", "lora")  # where programs put the tensors one level deeper


def is_pickle(file: Path) -> bool:
    """Whether a file is one of torch's, by its name or by how it begins."""
    if file.suffix.lower() in _SUFFIXES:
        return True
    with file.open("rb") as handle:
        start = handle.read(8)
    is_length = start.endswith(b"\0\0\0")  # of a safetensors header, which may begin alike
    return start.startswith(_ZIP) or (start.startswith(_PICKLES) and not is_length)


def read_pickle(file: Path) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """Tensors, text, and the names of what is neither; torch builds nothing but tensors and plain containers.

    Raises:
        FormatError: it is damaged, or asks for anything else.
    """
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle makes of torch's reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{file}: not read as tensors alone ({shown(reason)})") from error
    if not isinstance(values, Mapping):
        raise FormatError(f"{file}: expected tensors by name, found {type(values).__name__}")
    inside = next((values[name] for name in _INSIDE if isinstance(values.get(name), Mapping)), values)
    found: Mapping[Any, Any] = inside
    tensors = {str(key): value for key, value in found.items() if _is_plain(value)}
    metadata = {str(key): value for key, value in found.items() if isinstance(value, str)}
    return tensors, metadata, tuple(str(key) for key in found if str(key) not in {*tensors, *metadata})


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
