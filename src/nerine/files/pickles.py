"""Adapters in PyTorch's own container, for those who say that they trust the file: tensors and plain values only.

A pickle can run code when it is opened; `weights_only` keeps it from that, and everything that it then refuses or
trips over is a `FormatError` here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nerine.errors import FormatError, shown
from nerine.files.header import DTYPES, LARGEST

__all__ = ["SUFFIXES", "Pickled", "is_pickle", "is_safetensors", "read_pickle"]

SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".pkl"})
_NESTS = ("state_dict", "module")
_FORMATS = frozenset(DTYPES.values())


class Pickled(NamedTuple):
    """What a pickle holds: tensors, texts and numbers as text, and why the rest was left out."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    ignored: Mapping[str, str]


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins like this (nine bytes) can be a safetensors file."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LARGEST


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins like this is a pickle, or the zip archive that PyTorch puts one into."""
    protocol = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return not is_safetensors(head) and (protocol or head[:4] == b"PK\x03\x04")


def read_pickle(file: str | os.PathLike[str]) -> Pickled:
    """The state dict in a pickle, by itself or one level down under `state_dict` or `module`.

    Raises:
        FormatError: it cannot be read without running code, is damaged, or holds no state dict.
    """
    try:
        with open(file, "rb") as stream:  # by its name alone PyTorch takes some files for other formats
            content = torch.load(stream, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever torch trips over in a damaged or hostile file
        raise FormatError(
            f"{file}: cannot be read as a PyTorch file of tensors alone ({shown(error)}); "
            "convert it to .safetensors with the program that wrote it"
        ) from error
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for part in _levels(content, file):
        for key, value in part.items():
            if not isinstance(key, str):
                ignored[shown(key)] = f"its name is {type(key).__name__}, not text"
            elif isinstance(value, Tensor):
                tensors[key] = _plain(value, key, file)
            elif isinstance(value, str | int | float):
                metadata[key] = str(value)
            else:
                ignored[key] = f"it is {type(value).__name__}, neither a tensor nor a text"
    return Pickled(tensors, metadata, ignored)


def _levels(content: Any, file: str | os.PathLike[str]) -> list[Mapping[Any, Any]]:
    """The dictionaries that hold the tensors and what is told beside them."""
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected a dictionary of tensors, found {type(content).__name__}")
    for nest in _NESTS:
        if isinstance(content.get(nest), dict):
            return [{key: value for key, value in content.items() if key != nest}, content[nest]]
    return [content]


def _plain(value: Tensor, key: str, file: str | os.PathLike[str]) -> Tensor:
    where = f"{file}: {shown(key)}"
    if value.layout is not torch.strided or value.dtype not in _FORMATS or value.device.type != "cpu":
        raise FormatError(
            f"{where} is {value.dtype} in the layout {value.layout} on {value.device}, expected a plain tensor"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise FormatError(f"{where} claims the shape {tuple(value.shape)}, and the file has fewer numbers")
    return value.detach()
