"""Safetensors in and out: lazy reading, deterministic bytes, and writing that leaves the old file whole until the new
one is. Only tensors, never pickles.

Source: the safetensors format, https://github.com/huggingface/safetensors (8-byte length, JSON header, data).
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nerine.errors import FormatError

__all__ = ["Source", "open_file", "write_file"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl"}


class Source:
    """An open file: its keys and metadata at once, each tensor when it is asked for."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self.keys: tuple[str, ...] = tuple(sorted(handle.keys()))
        self.metadata: Mapping[str, str] = dict(handle.metadata() or {})

        self.config: Mapping[str, Any] = {}  # settings that stand in a file beside this one

    def dtype(self, key: str) -> torch.dtype:
        names = {v: k for k, v in _DTYPES.items()}
        return names.get(self._handle.get_slice(key).get_dtype(), torch.uint8)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(key).get_shape())

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            FormatError: its bytes cannot be read.
        """
        try:
            tensor: Tensor = self._handle.get_tensor(key)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise FormatError(f"{self.path}: the tensor {key!r} cannot be read: {error}") from error
        return tensor


@contextmanager
def open_file(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Iterator[Source]:
    """Open a safetensors file for reading.

    Raises:
        FormatError: there is no such file, it is a pickle, or it is truncated or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise FormatError(f"{file}: expected an adapter file, found {'a folder' if file.is_dir() else 'nothing'} there")
    if file.suffix.lower() in _PICKLES:
        raise FormatError(
            f"{file}: a pickle can run code when it is opened; "
            "convert it to .safetensors with the program that wrote it"
        )
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        size = file.stat().st_size
        raise FormatError(
            f"{file} ({size:,} bytes): not a whole safetensors file ({error}). "
            "Was the download or the save interrupted? Fetch or save it again"
        ) from error
    with handle:
        yield Source(file, handle)


class Outgoing(NamedTuple):
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_json(path, data):
    text = json.dumps(data, indent=2, sort_keys=True)
    Path(path).write_text(text)
    return len(text)


def write_file(path, tensors, metadata, hashes=False) -> int:
    if not isinstance(tensors, Mapping):
        tensors = {o.key: o.make() for o in tensors}
    return _write_file(path, tensors, metadata)


def _write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write `tensors` and return the number of bytes; the same content gives the same bytes.

    The file appears under its name only once it is complete and on the disk; an interruption or a full disk leaves
    whatever was there before, and no rubbish.

    Raises:
        FormatError: the folder does not exist, or a tensor has a format that the file cannot hold.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise FormatError(f"{file}: the folder {file.parent} does not exist; create it first")
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header = _header(order, tensors, metadata, file)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            for key in order:
                out.write(_bytes(tensors[key]))
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        os.chmod(temporary, _mode(file))
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(file.parent)
    return size


def _header(order: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _DTYPES:
            raise FormatError(f"{file}: {key} is {tensor.dtype}, which this file format cannot hold")
        end = offset + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def _mode(file: Path) -> int:
    """Permissions of the file that is replaced, else those that a new file would get."""
    if file.exists():
        return file.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the system lets folders be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
