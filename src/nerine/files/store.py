"""Safetensors in and out, a tensor at a time: bounded memory, deterministic bytes, and writing that leaves the old file
whole until the new one is. Pickles are read only where that is asked for, and then nothing in them runs.

Source: the safetensors format, https://github.com/huggingface/safetensors (8-byte length, JSON header, data).
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from nerine.errors import FormatError, shown
from nerine.files.hashes import PLACEHOLDERS, Hasher
from nerine.files.header import CODES, Bad, Entry, read_header
from nerine.files.pickles import is_pickle, read_pickle

__all__ = ["Outgoing", "Source", "open_file", "write_file", "write_json"]

if sys.byteorder != "little":
    raise ImportError("nerine reads and writes files on little-endian machines only")


class Source:
    """An open file: its keys and metadata at once, each tensor when it is asked for, in memory of its own.

    `config` are settings that stand in a file beside it; `ignored` is what a pickle holds that is no tensor.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
        read: Callable[[str], Tensor],
    ) -> None:
        self.path = path
        self.keys: tuple[str, ...] = tuple(sorted(shapes))
        self.metadata = dict(metadata)
        self.config: Mapping[str, Any] = {}
        self.ignored: tuple[str, ...] = ()
        self._shapes, self._read = shapes, read

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Source:
        """Tensors that are in memory already, as if they were a file at `path`."""
        shapes = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
        return cls(path, shapes, metadata, lambda key: tensors[key].detach())

    def dtype(self, key: str) -> torch.dtype:
        return self._shapes[key][0]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key][1]

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            FormatError: its bytes are no longer there.
        """
        return self._read(key)


@contextmanager
def open_file(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Iterator[Source]:
    """Open a safetensors file for reading, or with `allow_pickle` one of torch's.

    Raises:
        FormatError: there is no such file, it is a pickle, or it is truncated or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise FormatError(f"{file}: expected an adapter file, found {'a folder' if file.is_dir() else 'nothing'} there")
    if is_pickle(file):
        if not allow_pickle:
            raise FormatError(
                f"{file}: a pickle can run code when it is opened; convert it to .safetensors with the program that "
                "wrote it, or read it with allow_pickle=True, which runs nothing in it"
            )
        tensors, metadata, ignored = read_pickle(file)
        source = Source.of(tensors, metadata, file)
        source.ignored = ignored
        yield source
        return
    try:
        handle = file.open("rb", buffering=0)
    except OSError as error:
        raise FormatError(f"{file}: cannot be opened ({error})") from error
    with handle:
        size = os.fstat(handle.fileno()).st_size
        try:
            entries, metadata = read_header(handle, size)
        except Bad as bad:
            raise FormatError(
                f"{file} ({size:,} bytes): not a whole safetensors file ({bad}). "
                "Was the download or the save interrupted? Fetch or save it again"
            ) from bad
        shapes = {key: (entry.dtype, entry.shape) for key, entry in entries.items()}
        yield Source(file, shapes, metadata, lambda key: _read(handle, entries[key], key, file))


def _read(handle: BinaryIO, entry: Entry, key: str, file: Path) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    room = _bytes(tensor)
    handle.seek(entry.start)
    done = 0
    while done < len(room):
        count = handle.readinto(room[done:])  # type: ignore[attr-defined]
        if not count:
            raise FormatError(f"{file}: the file was cut short while it was read, within {shown(key)}")
        done += count
    return tensor


class Outgoing(NamedTuple):
    """A tensor to be written: what the header says of it, and how it is made when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[Outgoing],
    metadata: Mapping[str, str],
    *,
    hashes: bool = False,
) -> int:
    """Write `tensors`, made one at a time, and return the number of bytes; the same content gives the same bytes.

    With `hashes`, the metadata gets the two hashes by which sd-scripts knows a file. The file appears under its name
    only once it is complete and on the disk; an interruption or a full disk leaves whatever was there before, and no
    rubbish.

    Raises:
        FormatError: the folder does not exist, a name occurs twice, or a tensor has a format that the file cannot hold.
    """
    file = Path(path)
    order = _ordered(_outgoing(tensors), file)
    wanted = dict(metadata) | (dict(PLACEHOLDERS) if hashes else {})
    with _replacing(file) as out:
        header = _header(order, wanted, file)
        hasher = Hasher(_header(order, _of_training(metadata), file)) if hashes else None
        out.write(header)
        for outgoing in order:
            data = _bytes(_made(outgoing, file))
            out.write(data)
            if hasher is not None:
                hasher.feed(data)
        size = out.tell()
        if hasher is not None:
            out.seek(0)
            out.write(_header(order, wanted | hasher.values(), file))
    return size


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> int:
    """Write settings as JSON, whole or not at all; the number of bytes."""
    text = (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    with _replacing(Path(path)) as out:
        out.write(text)
    return len(text)


@contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """A file to write into that takes the place of `file` once it is whole and on the disk."""
    if not file.parent.is_dir():
        raise FormatError(f"{file}: the folder {file.parent} does not exist; create it first")
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:100]}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, _mode(file))
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(file.parent)


def _outgoing(tensors: Mapping[str, Tensor] | Iterable[Outgoing]) -> list[Outgoing]:
    if not isinstance(tensors, Mapping):
        return list(tensors)
    return [Outgoing(key, tuple(t.shape), t.dtype, lambda t=t: t) for key, t in tensors.items()]  # type: ignore[misc]


def _ordered(tensors: list[Outgoing], file: Path) -> list[Outgoing]:
    """The order in which safetensors writes: by format, the largest first, then by name."""
    names = {outgoing.key for outgoing in tensors}
    if len(names) < len(tensors):
        raise FormatError(f"{file}: two tensors would have the same name")
    for outgoing in tensors:
        if outgoing.dtype not in CODES:
            raise FormatError(f"{file}: {outgoing.key} is {outgoing.dtype}, which this file format cannot hold")
    return sorted(tensors, key=lambda outgoing: (-CODES[outgoing.dtype][0], outgoing.key))


def _header(order: Iterable[Outgoing], metadata: Mapping[str, str], file: Path) -> bytes:
    """Length and text of the header."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key, shape, dtype, _ in order:
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[key] = {"dtype": CODES[dtype][1], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _of_training(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.startswith("ss_")}


def _made(outgoing: Outgoing, file: Path) -> Tensor:
    tensor = outgoing.make()
    if tuple(tensor.shape) != outgoing.shape or tensor.dtype != outgoing.dtype:
        raise FormatError(
            f"{file}: {outgoing.key} was to be {outgoing.dtype} {outgoing.shape} and has become "
            f"{tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor


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
